// Masks: COCO's compressed RLE decoded and drawn on a canvas.

export const COLORS = [
  "#1f9e89", "#e4572e", "#3b6fd4", "#d49a1a", "#9c4dcc", "#3fa34d", "#d6336c", "#1098ad",
];

/** Run lengths of a compressed RLE string, background first, down the columns (maskApi.c). */
export function runLengths(counts) {
  const runs = [];
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let shift = 0;
    let digit;
    do {
      digit = counts.charCodeAt(at++) - 48;
      value |= (digit & 31) << shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** A mask of the image, of which only the part in its box is held. */
export class Mask {
  #bitmaps = new Map();
  #outline;

  /** From what the server says of it, and the image's height. */
  constructor(found, height) {
    Object.assign(this, found);
    const [x0, y0, x1, y1] = found.box.map(Math.round);
    Object.assign(this, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    this.imageHeight = height;
  }

  /** Calls visit(x, top, bottom) for the runs of foreground of every column. */
  #eachRun(visit) {
    let at = 0;
    let inside = false;
    for (const run of runLengths(this.counts)) {
      for (let left = inside ? run : 0, from = at; left > 0; ) {
        const top = from % this.imageHeight;
        const length = Math.min(left, this.imageHeight - top);
        visit(Math.floor(from / this.imageHeight), top, top + length);
        from += length;
        left -= length;
      }
      at += run;
      inside = !inside;
    }
  }

  /** 1 where the mask is, row by row, of its box with a border of one pixel. */
  #pixels() {
    const stride = this.width + 2;
    const pixels = new Uint8Array(stride * (this.height + 2));
    this.#eachRun((x, top, bottom) => {
      for (let y = top; y < bottom; y++) pixels[(y - this.y + 1) * stride + x - this.x + 1] = 1;
    });
    return pixels;
  }

  /** The box's pixels in a color where the mask is, transparent elsewhere. */
  bitmap(color) {
    if (!this.#bitmaps.has(color)) {
      const canvas = new OffscreenCanvas(this.width, this.height);
      const context = canvas.getContext("2d");
      context.fillStyle = color;
      this.#eachRun((x, top, bottom) => context.fillRect(x - this.x, top - this.y, 1, bottom - top));
      this.#bitmaps.set(color, canvas);
    }
    return this.#bitmaps.get(color);
  }

  /** The edges of its pixels to others, in pixels of the image. */
  get outline() {
    if (this.#outline) return this.#outline;
    const pixels = this.#pixels();
    const stride = this.width + 2;
    const path = new Path2D();
    // Straight edges are one line: of rows, then of columns.
    const trace = (lines, steps, at, next, line) => {
      for (let i = 1; i <= lines; i++) {
        for (let j = 1, from = 0; j <= steps + 1; j++) {
          const isEdge = pixels[at(i, j)] !== pixels[next(i, j)];
          if (isEdge && !from) from = j;
          if (!isEdge && from) {
            line(i - 1, from - 1, j - 1);
            from = 0;
          }
        }
      }
    };
    const { x, y } = this;
    trace(
      this.height + 1, this.width, (i, j) => i * stride + j, (i, j) => (i - 1) * stride + j,
      (i, from, to) => { path.moveTo(x + from, y + i); path.lineTo(x + to, y + i); },
    );
    trace(
      this.width + 1, this.height, (i, j) => j * stride + i, (i, j) => j * stride + i - 1,
      (i, from, to) => { path.moveTo(x + i, y + from); path.lineTo(x + i, y + to); },
    );
    return (this.#outline = path);
  }

  /** Draws it tinted and outlined; the context's unit is a pixel of the image. */
  draw(context, color, { alpha = 0.4, line = 2 } = {}) {
    context.globalAlpha = alpha;
    context.drawImage(this.bitmap(color), this.x, this.y);
    context.globalAlpha = 1;
    context.lineCap = "square";
    for (const [style, width] of [["#0007", line + 1.5], [color, line]]) {
      context.strokeStyle = style;
      context.lineWidth = width / context.getTransform().a;
      context.stroke(this.outline);
    }
  }

  /** A canvas with what the image shows within the mask. */
  cutout(picture, side = 96) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    const scale = Math.min((side - 6) / Math.max(this.width, this.height), 4);
    const [width, height] = [this.width * scale, this.height * scale];
    const place = [(side - width) / 2, (side - height) / 2, width, height];
    context.drawImage(this.bitmap("#000"), ...place);
    context.globalCompositeOperation = "source-in";
    context.drawImage(picture, this.x, this.y, this.width, this.height, ...place);
    return canvas;
  }
}
