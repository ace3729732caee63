// The media of the next question: chosen, dropped or drawn, stored through the gateway when the question is asked.

import { kindOf, thumbElement, thumbOf } from "./thumbs.js";

export class Tray {
  /** `onChange` is called with the kinds that lie in the tray. */
  constructor(list, onChange) {
    this.list = list;
    this.onChange = onChange;
    this.media = [];
  }

  async addFiles(files) {
    for (const file of files) {
      const kind = kindOf(file);
      this.add({ kind, blob: file, name: file.name, thumb: await thumbOf(file, kind) });
    }
  }

  add(medium) {
    this.media.push(medium);
    const item = thumbElement(medium);
    const remove = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${medium.name}`);
    remove.addEventListener("click", () => this.#remove(medium, item));
    item.append(remove);
    this.list.append(item);
    this.#changed();
  }

  /** Store what is not stored yet; return the media as a turn keeps them. */
  async stored(api) {
    for (const medium of this.media) medium.uri ??= await api.upload(medium.blob, medium.name);
    return this.media.map(({ kind, uri, thumb, name }) => ({ kind, uri, thumb, name }));
  }

  clear() {
    this.media = [];
    this.list.replaceChildren();
    this.#changed();
  }

  #remove(medium, item) {
    this.media.splice(this.media.indexOf(medium), 1);
    (item.nextElementSibling || item.previousElementSibling)?.querySelector("button").focus();
    item.remove();
    this.#changed();
  }

  #changed() {
    this.onChange(new Set(this.media.map((medium) => medium.kind)));
  }
}
