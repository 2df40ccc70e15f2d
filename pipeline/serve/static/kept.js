// The objects that were kept on this page, of all its images, with undo and redo.

const STORED = "maskpath-kept"; // in this tab's storage, so that reloading loses nothing

/**
 * By image id: {file_name, size, original_size, objects}; an object is {key, counts, box, score,
 * name}. A state is never changed but replaced by another, so undoing is going back to one.
 */
export class Kept {
  #undone = [];
  #done = [];
  #nextKey = 1;
  isSaved = false; // whether all of them were downloaded

  /** `changed` is called after every change. */
  constructor(changed) {
    this.changed = changed;
    this.images = {};
    try {
      this.images = JSON.parse(sessionStorage.getItem(STORED)) ?? {};
    } catch {
      // no storage, or something else in it
    }
    const keys = Object.values(this.images).flatMap((image) => image.objects.map((o) => o.key));
    this.#nextKey = Math.max(0, ...keys) + 1;
  }

  objects(id) {
    return this.images[id]?.objects ?? [];
  }

  get total() {
    return Object.values(this.images).reduce((sum, image) => sum + image.objects.length, 0);
  }

  add(image, { counts, box, score, name }) {
    const object = { key: this.#nextKey++, counts, box, score, name };
    this.#change(image, [...this.objects(image.id), object]);
  }

  rename(image, key, name) {
    const objects = this.objects(image.id);
    if (objects.find((object) => object.key === key)?.name === name) return;
    this.#change(image, objects.map((object) => (object.key === key ? { ...object, name } : object)));
  }

  remove(image, key) {
    this.#change(image, this.objects(image.id).filter((object) => object.key !== key));
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  undo() {
    this.#go(this.#done, this.#undone);
  }

  redo() {
    this.#go(this.#undone, this.#done);
  }

  #go(from, to) {
    if (!from.length) return;
    to.push(this.images);
    this.#show(from.pop());
  }

  #change(image, objects) {
    this.#done.push(this.images);
    this.#undone = [];
    const { name: file_name, size, original_size } = image;
    this.#show({ ...this.images, [image.id]: { file_name, size, original_size, objects } });
  }

  #show(images) {
    this.images = images;
    this.isSaved = false;
    try {
      sessionStorage.setItem(STORED, JSON.stringify(images));
    } catch {
      // full: they are still on the page
    }
    this.changed();
  }
}
