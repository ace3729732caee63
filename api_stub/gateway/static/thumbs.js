// Small pictures of files, for the page alone: the gateway gets the files themselves.

const SIDE = 96;
const PATIENCE_MS = 3000;

/** Return a data URL of a picture of the file, or null when the browser cannot show it. */
export async function thumbOf(file, kind) {
  try {
    return kind === "image" ? small(await createImageBitmap(file)) : await ofClip(file);
  } catch {
    return null;
  }
}

export function kindOf(file) {
  return file.type.startsWith("video/") || /\.(mkv|avi|mov|mp4|webm)$/i.test(file.name) ? "video" : "image";
}

async function ofClip(file) {
  const url = URL.createObjectURL(file);
  const video = Object.assign(document.createElement("video"), { muted: true, preload: "auto", src: url });
  try {
    await new Promise((resolve, reject) => {
      video.onloadeddata = resolve;
      video.onerror = reject;
      setTimeout(reject, PATIENCE_MS);
    });
    return small(video, video.videoWidth, video.videoHeight);
  } finally {
    video.removeAttribute("src");
    URL.revokeObjectURL(url);
  }
}

function small(source, width = source.width, height = source.height) {
  const scale = SIDE / Math.min(width, height);
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  const [w, h] = [width * scale, height * scale];
  canvas.getContext("2d").drawImage(source, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
  return canvas.toDataURL("image/jpeg", 0.8);
}

/** Return an element that shows a medium: {kind, thumb, name}. */
export function thumbElement({ kind, thumb, name }) {
  const item = document.createElement("li");
  const label = name || (kind === "video" ? "a clip" : "an image");
  if (thumb) {
    item.append(Object.assign(document.createElement("img"), { src: thumb, alt: label }));
  } else {
    item.append(Object.assign(document.createElement("span"), { className: "clip", textContent: label }));
  }
  if (kind === "video") item.append(Object.assign(document.createElement("span"), { className: "badge", textContent: "clip" }));
  return item;
}
