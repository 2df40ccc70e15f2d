// The tabs at the side: kept objects, proposals, detections.

import { Latest } from "./server.js";
import { COLORS, Mask } from "./mask.js";

const $ = (id) => document.getElementById(id);
const colorOf = (index) => COLORS[index % COLORS.length];

/** Shows the output beside a slider, and calls `changed` when it moves. */
function onSlider(slider, describe, changed) {
  const show = () => (slider.parentElement.querySelector("output").value = describe(slider.value));
  slider.addEventListener("input", () => {
    show();
    changed();
  });
  show();
}

/** A button with the cutout of a mask, and lines below. */
function cutoutButton(mask, picture, lines, choose) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(mask.cutout(picture));
  button.firstChild.className = "cutout";
  for (const line of lines) {
    const text = document.createElement("span");
    text.textContent = line;
    button.append(text);
  }
  button.setAttribute("aria-label", lines.join(" "));
  button.addEventListener("click", () => choose(mask));
  return button;
}

/** Fills a gallery; the button of the chosen mask is marked. */
function fillGallery(list, masks, page, linesOf) {
  list.replaceChildren(
    ...masks.map((mask) => {
      const item = document.createElement("li");
      item.append(cutoutButton(mask, page.picture, linesOf(mask), page.choose));
      item.mask = mask;
      return item;
    }),
  );
}

/** Marks the chosen mask in all galleries. */
export function markChosen(chosen) {
  for (const item of document.querySelectorAll(".gallery li")) {
    item.firstChild.classList.toggle("chosen", item.mask === chosen);
  }
}

/** The image's proposals, as far as the sliders let them. */
export class ProposalsPanel {
  #latest = new Latest();
  #distinct = new Map();

  constructor(page) {
    this.page = page;
    this.clear();
    onSlider($("min-score"), (value) => (+value).toFixed(2), () => this.update());
    onSlider($("max-iou"), (value) => (+value).toFixed(2), () => this.update());
    onSlider($("max-count"), (value) => value, () => this.update());
  }

  clear() {
    this.#latest.cancel();
    this.#distinct.clear();
    this.all = null;
    this.shown = [];
    $("proposal-list").replaceChildren();
    $("num-proposals").textContent = "";
  }

  /** Asks for what is needed, filters, and shows it. */
  async update() {
    const { image } = this.page;
    if (!image?.isReady) return;
    const [score, count] = [$("min-score").valueAsNumber, $("max-count").valueAsNumber];
    const iou = $("max-iou").valueAsNumber;
    const found = await this.#latest.run(async () => {
      const all = this.all ?? (await image.ask("/proposals")).map((p) => new Mask(p, image.size[0]));
      if (!this.#distinct.has(iou)) this.#distinct.set(iou, await image.ask(`/distinct?iou=${iou}`));
      return { all, distinct: this.#distinct.get(iou) };
    });
    if (!found) return;
    this.all = found.value.all;
    const fitting = found.value.distinct.map((i) => this.all[i]).filter((p) => p.score >= score);
    this.shown = fitting.slice(0, count);
    $("num-proposals").textContent = `${this.shown.length} of ${this.all.length} proposals`;
    fillGallery($("proposal-list"), this.shown, this.page, (p) => [p.score.toFixed(2)]);
    this.page.draw();
  }

  get overlay() {
    return this.shown.map((mask, i) => [mask, colorOf(i)]);
  }
}

/** What the detector found in the image, once it was asked for. */
export class DetectionsPanel {
  #hint = $("num-detections").textContent;

  constructor(page) {
    this.page = page;
    onSlider($("min-detection"), (value) => (+value).toFixed(2), () => this.update());
    $("detect").addEventListener("click", () => this.detect());
  }

  clear() {
    this.all = null;
    this.shown = [];
    $("detection-list").replaceChildren();
    $("num-detections").textContent = this.#hint;
    $("detect").disabled = !this.page.image?.isReady;
  }

  async detect() {
    const { page } = this;
    const { image } = page;
    if (!image?.isReady || $("detect").disabled) return;
    $("detect").disabled = true;
    try {
      const found = await image.detect((progress) => {
        if (image === page.image) page.progress("Detecting objects", progress);
      });
      if (image !== page.image) return;
      this.all = found.map((each) => new Mask(each, image.size[0]));
      this.update();
    } finally {
      if (image === page.image) {
        $("detect").disabled = this.all !== null;
        page.progress("", 1);
      }
    }
  }

  update() {
    if (!this.all) return;
    const score = $("min-detection").valueAsNumber;
    this.shown = this.all.filter((each) => each.score >= score);
    $("num-detections").textContent = `${this.shown.length} of ${this.all.length} detections`;
    fillGallery($("detection-list"), this.shown, this.page, (d) => [d.name, d.score.toFixed(2)]);
    this.page.draw();
  }

  get overlay() {
    const names = [...new Set(this.shown.map((each) => each.name))];
    return this.shown.map((each) => [each, colorOf(names.indexOf(each.name)), each.name]);
  }
}

/** The kept objects of the image: their names, and deleting them. */
export class KeptPanel {
  #masks = new Map();

  constructor(page, kept) {
    Object.assign(this, { page, kept });
    $("undo").addEventListener("click", () => kept.undo());
    $("redo").addEventListener("click", () => kept.redo());
  }

  #maskOf(object) {
    if (!this.#masks.has(object.key)) {
      this.#masks.set(object.key, new Mask(object, this.page.image.size[0]));
    }
    return this.#masks.get(object.key);
  }

  update() {
    const { kept, page } = this;
    const objects = page.picture ? kept.objects(page.image.id) : [];
    const focused = document.activeElement.closest?.("#kept-list li")?.dataset.key;
    $("kept-list").replaceChildren(...objects.map((object, i) => this.#row(object, i)));
    $("kept-list").querySelector(`[data-key="${focused}"] button`)?.focus();
    $("num-kept").textContent = kept.total;
    const others = kept.total - objects.length;
    $("others").textContent = others ? `${others} in other images` : "";
    $("kept-hint").hidden = objects.length > 0;
    $("undo").disabled = !kept.canUndo;
    $("redo").disabled = !kept.canRedo;
  }

  #row(object, index) {
    const { kept, page } = this;
    const row = document.createElement("li");
    row.dataset.key = object.key;
    const mask = this.#maskOf(object);
    const show = document.createElement("button");
    show.className = "cutout";
    show.style.setProperty("--color", colorOf(index));
    show.setAttribute("aria-label", `Show object ${index + 1}`);
    show.append(mask.cutout(page.picture));
    show.addEventListener("click", () => page.choose(mask));
    const name = document.createElement("input");
    name.value = object.name;
    name.placeholder = "name";
    name.maxLength = 100;
    name.setAttribute("list", "names");
    name.setAttribute("aria-label", `Name of object ${index + 1}`);
    name.addEventListener("change", () => kept.rename(page.image, object.key, name.value.trim()));
    const remove = document.createElement("button");
    remove.className = "icon";
    remove.textContent = "×";
    remove.title = "Delete (Delete)";
    remove.setAttribute("aria-label", `Delete object ${index + 1}`);
    remove.addEventListener("click", () => kept.remove(page.image, object.key));
    row.append(show, name, remove);
    return row;
  }

  get overlay() {
    if (!this.page.image) return [];
    const objects = this.kept.objects(this.page.image.id);
    return objects.map((object, i) => [this.#maskOf(object), colorOf(i), object.name]);
  }
}
