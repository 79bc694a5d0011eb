// Boxes and points of an answer on a picture. The server reads them out of the text, as `generate` does, in pixels.

const NUM_COLORS = 8;

/** A figure over one answer and the pictures it may speak of; empty until the answer names a place. */
class MarkedPicture {
  constructor(pictures) {
    this.pictures = pictures;
    this.chosen = 0;
    this.text = "";
    this.isAsking = false;
    this.figure = make("figure", { className: "marked", hidden: true });
  }

  /** Looks for places in `text`; while one look is on its way only the newest text waits. */
  async look(text) {
    this.text = text;
    if (this.isAsking || !this.pictures.length || !/[\]}]/.test(text)) return;
    this.isAsking = true;
    try {
      for (let seen = null; seen !== this.text; ) {
        seen = this.text;
        const medium = this.pictures[this.chosen];
        if (!medium.width) break; // no picture that the browser can show
        const body = JSON.stringify({ text: seen, width: medium.width, height: medium.height });
        const { marks } = await (await ask("page/marks", body)).json();
        if (marks.length) this.show(medium, marks);
      }
    } catch (error) {
      notice(`The places could not be drawn: ${error.message}`);
    } finally {
      this.isAsking = false;
    }
  }

  show(medium, marks) {
    const labels = [...new Set(marks.map((mark) => mark.label))];
    const canvas = make("div", { className: "canvas" });
    const words = marks.map((mark) => `${mark.label || "unnamed"} at ${(mark.box ?? mark.point).map(Math.round).join(", ")}`);
    const alt = `${medium.name}, with ${marks.length} marked: ${words.join("; ")}`;
    const image = make("img", { src: medium.url, alt, width: medium.width, height: medium.height });
    canvas.classList.toggle("small", medium.width < 240);
    canvas.append(image, ...marks.map((mark) => this.makeMark(mark, medium, labels.indexOf(mark.label) % NUM_COLORS)));
    const parts = [canvas];
    if (this.pictures.length > 1) parts.unshift(this.makeChooser());
    const named = labels.filter(Boolean).join(", ");
    const count = `${marks.length} ${marks.length === 1 ? "place" : "places"}`;
    parts.push(make("figcaption", { textContent: named ? `${count}: ${named}` : count }));
    keepAtEnd(() => {
      this.figure.replaceChildren(...parts);
      this.figure.hidden = false;
    });
  }

  makeMark(mark, medium, color) {
    const [x1, y1, x2, y2] = mark.box ?? [...mark.point, ...mark.point];
    const share = (value, whole) => `${(100 * value) / whole}%`;
    const element = make("div", { className: `mark color-${color} ${mark.box ? "area" : "spot"}`, "aria-hidden": "true" });
    Object.assign(element.style, { left: share(x1, medium.width), top: share(y1, medium.height) });
    if (mark.box) Object.assign(element.style, { width: share(x2 - x1, medium.width), height: share(y2 - y1, medium.height) });
    if (mark.label) {
      const label = make("span", { textContent: mark.label });
      label.classList.toggle("below", y1 < medium.height * 0.12);
      label.classList.toggle("leftward", x1 > medium.width * 0.6);
      element.append(label);
    }
    return element;
  }

  /** Answers do not say which picture they mean: the first one, until the user says another. */
  makeChooser() {
    const choices = this.pictures.map((medium, index) => {
      const choice = button(`Picture ${index + 1}`, () => {
        this.chosen = index;
        this.look(this.text).then(() => this.figure.querySelectorAll("button")[index].focus());
      });
      choice.setAttribute("aria-pressed", String(index === this.chosen));
      return choice;
    });
    return make("div", { className: "chooser", role: "group", "aria-label": "Draw on" }, ...choices);
  }
}
