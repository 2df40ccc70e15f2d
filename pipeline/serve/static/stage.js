// The image in the middle: its pointer, the masks at a point, and what is drawn over it.

import { Latest } from "./server.js";

const CHOSEN = "#ffd60a"; // color of the mask at the pointer
const MARGIN = 12; // px around the image
const WHEEL_STEP = 50; // px of the wheel for the next mask
const ARROW_STEP = 8; // px of the image
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const NOTHING = { masks: [], index: 0, at: null, isPinned: false };

export class Stage {
  /** What `overlay` gives is drawn as well: [mask, color, label] each. */
  overlay = () => [];
  #latest = new Latest();
  #isAsking = false;
  #waiting = null;
  #wheel = 0;

  /**
   * @param {HTMLElement} element around the canvas, which has the focus
   * @param {HTMLCanvasElement} canvas
   * @param {{masksAt: (x, y) => Promise<Mask[]>, changed: () => void, failed: (error) => void}} page
   */
  constructor(element, canvas, page) {
    Object.assign(this, { element, canvas, page, picture: null, ...NOTHING });
    new ResizeObserver(() => this.draw()).observe(element);
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "touch" && !this.isPinned) this.#preview(this.#pointOf(event));
    });
    canvas.addEventListener("pointerleave", () => {
      if (!this.isPinned) this.release();
    });
    canvas.addEventListener("click", (event) => this.click(this.#pointOf(event)));
    canvas.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Shows an image, given its pixels. */
  show(picture) {
    this.picture = picture;
    this.cursor = { x: picture.width / 2, y: picture.height / 2 };
    this.canvas.hidden = false;
    this.release();
  }

  /** The mask that is previewed or chosen; undefined without one. */
  get mask() {
    return this.masks[this.index];
  }

  /** Chooses masks, of which one is shown. */
  pin(masks, index = 0, at = null) {
    this.#latest.cancel();
    Object.assign(this, { masks, index, at, isPinned: masks.length > 0 });
    this.#changed();
  }

  /** Lets go of the mask. */
  release() {
    this.#latest.cancel();
    this.#waiting = null;
    Object.assign(this, NOTHING);
    this.#changed();
  }

  /** The next or previous mask at the point. */
  step(by) {
    if (!this.masks.length) return;
    this.index = Math.min(Math.max(this.index + by, 0), this.masks.length - 1);
    this.#changed();
  }

  /** Chooses the best mask at a point of the image. */
  async click(at) {
    if (!this.picture) return;
    this.cursor = at;
    this.#waiting = null;
    // From now on it is chosen, wherever the pointer goes; what is drawn stays for the moment.
    Object.assign(this, { ...NOTHING, isPinned: true });
    this.page.changed();
    try {
      const found = await this.#latest.run(() => this.page.masksAt(at.x, at.y));
      if (found) this.pin(found.value, 0, at);
    } catch (error) {
      this.release();
      this.page.failed(error);
    }
  }

  /** Shows the best mask at a point; one request at a time, and the last point wins. */
  async #preview(at) {
    this.cursor = at;
    this.#waiting = at;
    if (this.#isAsking) return;
    this.#isAsking = true;
    while (this.#waiting && !this.isPinned && this.picture) {
      const point = this.#waiting;
      this.#waiting = null;
      try {
        const found = await this.#latest.run(() => this.page.masksAt(point.x, point.y));
        if (found) {
          Object.assign(this, { masks: found.value, index: 0, at: point });
          this.#changed();
        }
      } catch (error) {
        this.page.failed(error);
      }
    }
    this.#isAsking = false;
  }

  #changed() {
    this.page.changed();
    this.draw();
  }

  #pointOf(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = (value, start, side, pixels) =>
      Math.min(Math.max(((value - start) / side) * pixels, 0), pixels - 0.01);
    return {
      x: at(event.clientX, box.left, box.width, this.picture.width),
      y: at(event.clientY, box.top, box.height, this.picture.height),
    };
  }

  #onWheel(event) {
    if (!this.masks.length || event.ctrlKey) return; // with Ctrl the browser zooms
    event.preventDefault();
    this.#wheel += event.deltaMode ? Math.sign(event.deltaY) * WHEEL_STEP : event.deltaY;
    const steps = Math.trunc(this.#wheel / WHEEL_STEP);
    this.#wheel -= steps * WHEEL_STEP;
    if (steps) this.step(steps);
  }

  #onKey(event) {
    if (event.target !== this.element || !this.picture || event.ctrlKey || event.metaKey) return;
    if (event.key === " ") {
      event.preventDefault();
      this.click(this.cursor);
    } else if (event.key in ARROWS) {
      event.preventDefault();
      const step = event.shiftKey ? 1 : ARROW_STEP;
      const [dx, dy] = ARROWS[event.key];
      if (this.isPinned) this.release();
      this.#preview({
        x: Math.min(Math.max(this.cursor.x + dx * step, 0), this.picture.width - 0.01),
        y: Math.min(Math.max(this.cursor.y + dy * step, 0), this.picture.height - 0.01),
      });
    }
  }

  /** Draws the image as large as it fits, and all that lies over it. */
  draw() {
    if (!this.picture) return;
    const { canvas, picture, element } = this;
    const room = [element.clientWidth, element.clientHeight].map((side) => side - 2 * MARGIN);
    const fit = Math.max(Math.min(room[0] / picture.width, room[1] / picture.height), 0.01);
    const size = [picture.width * fit, picture.height * fit];
    const density = window.devicePixelRatio;
    [canvas.width, canvas.height] = size.map((side) => Math.max(1, Math.round(side * density)));
    [canvas.style.width, canvas.style.height] = size.map((side) => `${side}px`);
    const context = canvas.getContext("2d");
    const scale = canvas.width / picture.width;
    context.scale(scale, scale);
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, 0, 0);
    const labels = [];
    for (const [mask, color, label] of this.overlay()) {
      mask.draw(context, color, { alpha: this.isPinned ? 0.1 : 0.3, line: 1.5 * density });
      if (label) labels.push([mask, color, label]);
    }
    if (this.mask) {
      this.mask.draw(context, CHOSEN, { alpha: 0.25, line: (this.isPinned ? 3 : 1.5) * density });
    }
    for (const label of labels) drawLabel(context, density / scale, ...label);
    if (this.at) drawPoint(context, this.at, density / scale);
  }
}

/** A label at the top of a mask; `unit` is a pixel of the page in pixels of the image. */
function drawLabel(context, unit, mask, color, text) {
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 8 * unit;
  const x = Math.max(0, Math.min(mask.x, context.canvas.width / context.getTransform().a - width));
  const y = Math.max(mask.y - 18 * unit, 0);
  context.fillStyle = color;
  context.fillRect(x, y, width, 18 * unit);
  context.fillStyle = "#fff";
  context.fillText(text, x + 4 * unit, y + 13 * unit);
}

function drawPoint(context, { x, y }, unit) {
  context.beginPath();
  context.arc(x, y, 4 * unit, 0, 2 * Math.PI);
  context.fillStyle = "#fff";
  context.fill();
  context.lineWidth = 2 * unit;
  context.strokeStyle = "#000a";
  context.stroke();
}
