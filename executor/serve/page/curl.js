// A request as a command for a shell: it works as it stands. Small media are written into it, in lines short enough for
// any terminal; large ones are read from their files, so the command stays short enough to paste.

const INLINE_BYTES = 24 * 1024;
const MEDIA_LINE = 76;

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The command of a body (an object whose data URLs are `mark + index + mark`) and its media. */
async function curlCommand(body, media, mark) {
  const pieces = JSON.stringify(body).split(mark); // text, index, text, ...
  const lines = [];
  for (let at = 0; at < pieces.length; at++) {
    if (at % 2 === 0) {
      lines.push(`printf %s ${quoted(pieces[at])}`);
      continue;
    }
    const medium = media[Number(pieces[at])];
    const [head, base64] = (await dataUrl(medium)).split(",", 2);
    lines.push(`printf %s ${quoted(`${head},`)}`);
    if (isRead(medium)) lines.push(`base64 < ${quoted(medium.name)} | tr -d '\\n'`);
    else lines.push(`tr -d '\\n' <<'MEDIA'\n${(base64.match(new RegExp(`.{1,${MEDIA_LINE}}`, "g")) ?? []).join("\n")}\nMEDIA`);
  }
  const files = [...new Set(media.filter(isRead).map((medium) => medium.name))];
  const guards = [];
  if (key.value) guards.push(`: "\${API_KEY:?set it to the key of this server}" && `);
  if (files.length) guards.push(`ls -- ${files.map(quoted).join(" ")} && `);
  const header = key.value ? ` -H "Authorization: Bearer $API_KEY"` : "";
  const url = quoted(address("v1/chat/completions"));
  return `${guards.join("")}{\n${lines.join("\n")}\n} | curl -sS ${url}${header} -H 'Content-Type: application/json' --data-binary @-\n`;
}

const isRead = (medium) => medium.isFile && medium.blob.size > INLINE_BYTES;

/** What a user must know to run it. */
function curlAdvice(media) {
  const names = media.filter(isRead).map((medium) => medium.name);
  const needs = [];
  if (names.length) needs.push(`run it in the folder of ${[...new Set(names)].join(", ")}`);
  if (key.value) needs.push("set API_KEY before");
  return needs.length ? `Copied; ${needs.join(", and ")}.` : "Copied.";
}
