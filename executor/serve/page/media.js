// Pictures and videos of a question: kept as files, shown small, sent as data URLs, in the order in which they stand.

let numMedia = 0;

/** `isFile`: it lies on the user's disk under this name. */
function newMedium(blob, isFile) {
  const isVideo = blob.type.startsWith("video/") || /\.(mp4|m4v|mov|mkv|avi|webm|ts|flv|wmv)$/i.test(blob.name ?? "");
  const kind = isVideo ? "video" : "image";
  const name = isFile ? blob.name : `pasted ${isVideo ? "video" : "picture"}`;
  const medium = { id: ++numMedia, kind, name, blob, isFile, url: URL.createObjectURL(blob), width: 0, height: 0, read: null };
  return medium;
}

/** The whole of it as a data URL; read once. */
function dataUrl(medium) {
  medium.read ??= new Promise((resolve, reject) => {
    const reader = new FileReader();
    const type = medium.blob.type || (medium.kind === "video" ? "video/mp4" : "image/png");
    reader.onload = () => resolve(`data:${type};base64,${reader.result.split(",", 2)[1] ?? ""}`);
    reader.onerror = () => reject(new AskError(`${medium.name} cannot be read any more; choose it again.`));
    reader.readAsDataURL(medium.blob);
  });
  return medium.read;
}

/** A picture as the browser shows it; what it cannot show (TIFF, say) has its name, and is sent all the same. */
function preview(medium, alt, controls = false) {
  const holder = make("span", { className: "preview" });
  const broken = () => holder.replaceChildren(make("span", { className: "nameless", textContent: medium.name }));
  if (medium.kind === "video") {
    const video = make("video", { src: medium.url, muted: true, controls, playsInline: true, preload: "metadata", onerror: broken });
    video.setAttribute("aria-label", alt);
    holder.append(video);
    return holder;
  }
  const image = make("img", { src: medium.url, alt, onerror: broken });
  image.onload = () => ([medium.width, medium.height] = [image.naturalWidth, image.naturalHeight]);
  holder.append(image);
  return holder;
}

const nameOf = (medium, index) => `${medium.kind === "video" ? "Video" : "Picture"} ${index + 1}: ${medium.name}`;

/** The media of the question that is being written. */
const tray = {
  media: [],
  limits: null,

  add(blobs, isFile) {
    for (const blob of blobs) this.media.push(newMedium(blob, isFile));
    this.show();
    const count = this.media.length;
    notice(count === 1 ? `${this.media[0].name} is added.` : `${count} pictures or videos are added.`);
    find("question").focus();
  },

  take() {
    const media = this.media;
    this.media = [];
    this.show();
    return media;
  },

  fill(media) {
    this.media = [...media];
    this.show();
  },

  remove(index) {
    const [gone] = this.media.splice(index, 1);
    this.show();
    notice(`${gone.name} is removed.`);
    const left = find("media").querySelectorAll(".remove");
    (left[Math.min(index, left.length - 1)] ?? find("choose")).focus();
  },

  moveEarlier(index) {
    const [medium] = this.media.splice(index, 1);
    this.media.splice(index - 1, 0, medium);
    this.show();
    notice(`${medium.name} is number ${index} now.`);
    const item = find("media").children[index - 1];
    (item.querySelector(".earlier") ?? item.querySelector(".remove")).focus();
  },

  show() {
    const items = this.media.map((medium, index) => {
      const words = nameOf(medium, index);
      const item = make("li", { title: `${medium.name}, ${size(medium.blob.size)}` }, preview(medium, words));
      item.append(make("span", { className: "number", textContent: index + 1, "aria-hidden": "true" }));
      const remove = make("button", { type: "button", className: "remove", "aria-label": `Remove ${words}` }, icon("remove"));
      remove.onclick = () => this.remove(index);
      if (index) {
        const earlier = make("button", { type: "button", className: "earlier", "aria-label": `Move ${words} earlier` }, icon("earlier"));
        earlier.onclick = () => this.moveEarlier(index);
        item.append(earlier);
      }
      item.append(remove);
      return item;
    });
    find("media").replaceChildren(...items);
    find("media").hidden = !items.length;
    find("order").hidden = items.length < 2;
  },

  /** Why these media cannot be sent to this server; null when they can. */
  fault(media) {
    const limits = this.limits;
    if (!limits) return null;
    const numVideos = media.filter((medium) => medium.kind === "video").length;
    const numPictures = media.length - numVideos;
    const large = media.find((medium) => medium.blob.size > limits.max_media_bytes);
    const empty = media.find((medium) => medium.blob.size === 0);
    if (empty) return `${empty.name} is empty.`;
    if (large)
      return `${large.name} has ${size(large.blob.size)}; this server takes ${size(limits.max_media_bytes)} at most.`;
    if (numPictures > limits.max_pictures)
      return `The conversation has ${numPictures} pictures; this server takes ${limits.max_pictures} at most. Begin a new one.`;
    if (numVideos > limits.max_videos)
      return `The conversation has ${numVideos} videos; this server takes ${limits.max_videos} at most. Begin a new one.`;
    const total = media.reduce((sum, medium) => sum + Math.ceil(medium.blob.size / 3) * 4, 0);
    if (total > limits.max_body_bytes)
      return `All pictures and videos together are ${size(total)} on their way; this server takes ${size(limits.max_body_bytes)}.`;
    return null;
  },
};
