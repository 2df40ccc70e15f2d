// Requests to the server; its errors are one line for the user.

const GONE = 404;
const POLL = 250; // ms between two questions how far a network is

/** What the server refused, or that it did not answer; `status` is 0 then. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Sends a request and returns the response; throws a ServerError. */
export async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer: is tools/serve.py still running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new ServerError(answer.error ?? `The server says ${response.status}`, response.status);
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, body) => (await request(path, { method: "POST", body })).json();

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Asks until a task has ended; calls `report` with the progress up to 1. */
async function finish(ask, report) {
  for (;;) {
    const status = await ask();
    report(status.progress);
    if (status.state === "done") return;
    if (status.state === "failed") throw new ServerError(status.error);
    await pause(POLL);
  }
}

/** An image that the server has opened: its id, size and original_size as [height, width]. */
export class RemoteImage {
  isReady = false; // whether the network has run over it

  /** `ask` has the server open the image, also once more when it had to give it up. */
  constructor(name, ask) {
    this.name = name;
    this.askToOpen = ask;
  }

  async open() {
    Object.assign(this, await this.askToOpen());
  }

  /** Waits for the network. */
  async finish(report) {
    await finish(() => get(this.path("")), report);
    this.isReady = true;
  }

  path(end) {
    return `api/images/${this.id}${end}`;
  }

  /** Does something with the image; once more after opening it if the server has it no more. */
  async retrying(action) {
    try {
      return await action();
    } catch (error) {
      if (error.status !== GONE) throw error;
      await this.open();
      await this.finish(() => {});
      return action();
    }
  }

  ask(end) {
    return this.retrying(() => get(this.path(end)));
  }

  masksAt(x, y) {
    return this.ask(`/masks?x=${x}&y=${y}`);
  }

  /** Runs the detector, and returns what it found. */
  detect(report) {
    return this.retrying(async () => {
      await finish(() => post(this.path("/detections")), report);
      return get(this.path("/detections"));
    });
  }
}

/** The latest of several runs of an asynchronous function: earlier ones never come to their end. */
export class Latest {
  #count = 0;

  /** Runs it; resolves to {value}, or to null if it was overtaken meanwhile. */
  async run(work) {
    const number = ++this.#count;
    try {
      const value = await work();
      return number === this.#count ? { value } : null;
    } catch (error) {
      if (number !== this.#count) return null;
      throw error;
    }
  }

  cancel() {
    this.#count++;
  }

  /** Whether it was run at all. */
  get wasRun() {
    return this.#count > 0;
  }
}
