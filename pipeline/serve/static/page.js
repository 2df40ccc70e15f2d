// The page: which image is shown, the tabs, the keys and the downloads.

import { Kept } from "./kept.js";
import { Mask } from "./mask.js";
import { DetectionsPanel, KeptPanel, ProposalsPanel, markChosen } from "./panels.js";
import { Latest, RemoteImage, ServerError, get, post, request } from "./server.js";
import { Stage } from "./stage.js";

const $ = (id) => document.getElementById(id);
const TABS = ["kept", "proposals", "detections"];
const MB = 2 ** 20;

/** What the panels see of the page. */
const page = {
  image: null, // RemoteImage
  picture: null, // its pixels
  draw: () => stage.draw(),
  choose(mask) {
    if (mask.name) $("name").value = mask.name;
    stage.pin([mask]);
    $("stage").focus({ preventScroll: true });
  },
  progress: showProgress,
};

let settings = { max_bytes: Infinity };
let files = [];
let tab = "kept";
const opening = new Latest();
const kept = new Kept(() => showKept());
const stage = new Stage($("stage"), $("picture"), {
  async masksAt(x, y) {
    const { image } = page;
    return image?.isReady ? (await image.masksAt(x, y)).map((m) => new Mask(m, image.size[0])) : [];
  },
  changed: () => showSelection(),
  failed: showError,
});
const panels = {
  kept: new KeptPanel(page, kept),
  proposals: new ProposalsPanel(page),
  detections: new DetectionsPanel(page),
};
stage.overlay = () => (page.image?.isReady ? panels[tab].overlay : []);

// Messages -----------------------------------------------------------------------------------------

function showError(error) {
  $("error").hidden = !error;
  if (!error) return;
  if (!(error instanceof ServerError)) console.error(error);
  $("error").querySelector("span").textContent = error.message;
}

function showProgress(text, progress) {
  const bar = $("progress");
  bar.hidden = !text || progress >= 1;
  const percent = Math.round(100 * progress);
  bar.setAttribute("aria-valuenow", percent);
  bar.querySelector("i").style.width = `${percent}%`;
  bar.querySelector("span").textContent = `${text} ${percent} %`;
}

/** Does something; its error is shown and the page goes on. */
async function attempt(work) {
  try {
    showError(null);
    await work();
  } catch (error) {
    showError(error);
  }
}

// Images -------------------------------------------------------------------------------------------

/** Opens an image and shows it; the masks come when the network has run. */
async function openImage(name, open) {
  const image = new RemoteImage(name, open);
  const isShown = () => page.image === image;
  const opened = await opening.run(async () => {
    await image.open();
    const response = await request(image.path("/picture"));
    return createImageBitmap(await response.blob());
  });
  if (!opened) return; // another one was opened meanwhile
  Object.assign(page, { image, picture: opened.value });
  $("empty").hidden = true;
  $("file-name").textContent = describeImage(image);
  stage.show(page.picture);
  for (const name of ["proposals", "detections"]) panels[name].clear();
  showKept();
  try {
    await image.finish((progress) => isShown() && showProgress("Looking at the image", progress));
  } catch (error) {
    if (!isShown()) return;
    showProgress("", 1);
    throw error;
  }
  if (!isShown()) return;
  $("detect").disabled = false;
  showProgress("", 1);
  showSelection();
  await showTab(tab);
}

function describeImage({ name, size, original_size }) {
  const [[height, width], [fileHeight, fileWidth]] = [size, original_size];
  const seen = `${name}, ${fileWidth} × ${fileHeight}`;
  const reduced = `reduced to ${width} × ${height} here; downloads have the file's size`;
  return height === fileHeight && width === fileWidth ? seen : `${seen}, ${reduced}`;
}

/** Opens a file that was dropped, pasted or chosen. */
function openUpload(file) {
  if (!file) return;
  attempt(async () => {
    if (file.size > settings.max_bytes) {
      const [size, limit] = [file.size, settings.max_bytes].map((bytes) => (bytes / MB).toFixed(1));
      throw new ServerError(`${file.name} has ${size} MB; the limit is ${limit} MB (--max-bytes)`);
    }
    markFile(-1);
    const path = `api/images?name=${encodeURIComponent(file.name)}`;
    await openImage(file.name, () => post(path, file));
  });
}

function openListed(index) {
  if (!(index in files)) return;
  attempt(async () => {
    markFile(index);
    const path = `api/files/open?name=${encodeURIComponent(files[index])}`;
    await openImage(files[index], () => post(path));
  });
}

const currentFile = () => [...$("files").children].findIndex((button) => button.ariaCurrent === "true");

function markFile(index) {
  for (const [i, button] of [...$("files").children].entries()) button.ariaCurrent = String(i === index);
  $("files").children[index]?.scrollIntoView({ block: "nearest", inline: "nearest" });
  $("previous-image").disabled = index <= 0;
  $("next-image").disabled = index + 1 >= files.length;
}

async function listFiles() {
  files = await get("api/files");
  for (const id of ["files", "previous-image", "next-image"]) $(id).hidden = !files.length;
  $("files").replaceChildren(
    ...files.map((name, index) => {
      const button = document.createElement("button");
      button.title = name;
      const thumbnail = new Image();
      thumbnail.loading = "lazy";
      thumbnail.alt = name;
      thumbnail.src = `api/files/thumbnail?name=${encodeURIComponent(name)}`;
      button.append(thumbnail);
      button.addEventListener("click", () => openListed(index));
      return button;
    }),
  );
  if (!opening.wasRun) openListed(0); // else somebody was faster
}

// The mask at the point ----------------------------------------------------------------------------

function showSelection() {
  const { masks, index, mask } = stage;
  $("keep").disabled = !mask;
  $("previous-mask").disabled = index <= 0;
  $("next-mask").disabled = index + 1 >= masks.length;
  const place = masks.length > 1 ? `${index + 1} of ${masks.length} · ` : "";
  const ready = page.image?.isReady ? "Click on an object" : " ";
  $("which").value = mask ? `${place}score ${mask.score.toFixed(2)}` : ready;
  markChosen(mask);
}

function keepMask() {
  if (!stage.mask) return;
  kept.add(page.image, { ...stage.mask, name: $("name").value.trim() });
  stage.release();
  $("stage").focus({ preventScroll: true });
}

function showKept() {
  panels.kept.update();
  stage.draw();
}

function removeKept() {
  const focused = document.activeElement.closest("#kept-list li")?.dataset.key;
  const key = focused ? Number(focused) : kept.objects(page.image?.id).at(-1)?.key;
  if (key) kept.remove(page.image, key);
}

// Tabs and downloads -------------------------------------------------------------------------------

async function showTab(name) {
  tab = name;
  for (const each of TABS) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).ariaSelected = String(each === name);
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  $("what").value = name;
  await panels[name].update();
  stage.draw();
}

/** The images and objects of the chosen kind, as the server takes them. */
async function chosenObjects() {
  const what = $("what").value;
  if (what === "kept") return Object.values(kept.images).filter((image) => image.objects.length);
  await panels[what].update();
  const { name: file_name, size, original_size } = page.image ?? {};
  return page.image ? [{ file_name, size, original_size, objects: panels[what].shown }] : [];
}

async function download() {
  const images = await chosenObjects();
  if (!images.some((image) => image.objects.length)) {
    throw new ServerError("There is nothing to download yet");
  }
  const content = images.map((image) => ({
    ...image,
    objects: image.objects.map(({ counts, score, name = "" }) => ({ counts, score, name })),
  }));
  const body = JSON.stringify(content);
  const response = await request(`api/downloads/${$("format").value}`, { method: "POST", body });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = /filename="(.*)"/.exec(response.headers.get("Content-Disposition"))[1];
  link.click();
  if ($("what").value === "kept") kept.isSaved = true;
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Events -------------------------------------------------------------------------------------------

const KEYS = {
  "[": () => stage.step(-1),
  "]": () => stage.step(1),
  Enter: keepMask,
  k: keepMask,
  Escape: () => stage.release(),
  Delete: removeKept,
  Backspace: removeKept,
  p: () => openListed(currentFile() - 1),
  n: () => openListed(currentFile() + 1),
  o: () => $("file").click(),
  d: () => attempt(() => showTab("detections").then(() => panels.detections.detect())),
  1: () => attempt(() => showTab("kept")),
  2: () => attempt(() => showTab("proposals")),
  3: () => attempt(() => showTab("detections")),
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const { target } = event;
  const isTyping = target.matches('select, input:not([type="range"])');
  if (isTyping || $("help").open || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z" || key === "y") {
      event.preventDefault();
      if (key === "y" || event.shiftKey) kept.redo();
      else kept.undo();
    }
  } else if (key in KEYS && !(key === "Enter" && target.matches("button"))) {
    event.preventDefault();
    KEYS[key]();
  }
});

for (const name of TABS) {
  $(`tab-${name}`).addEventListener("click", () => attempt(() => showTab(name)));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const next = TABS[(TABS.indexOf(name) + by + TABS.length) % TABS.length];
    attempt(() => showTab(next));
    $(`tab-${next}`).focus();
  });
}
$("selection").addEventListener("submit", (event) => {
  event.preventDefault();
  keepMask();
});
$("download").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(download);
});
$("previous-mask").addEventListener("click", () => stage.step(-1));
$("next-mask").addEventListener("click", () => stage.step(1));
$("previous-image").addEventListener("click", () => openListed(currentFile() - 1));
$("next-image").addEventListener("click", () => openListed(currentFile() + 1));
$("help-button").addEventListener("click", () => $("help").showModal());
$("error").querySelector("button").addEventListener("click", () => showError(null));
for (const id of ["open", "choose"]) $(id).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  openUpload($("file").files[0]);
  $("file").value = "";
});
window.addEventListener("beforeunload", (event) => {
  if (kept.total && !kept.isSaved) event.preventDefault(); // the browser asks
});
document.addEventListener("paste", (event) => openUpload(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("stage").classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("dropping");
  openUpload(event.dataTransfer.files[0]);
});

attempt(async () => {
  history.replaceState(null, "", location.pathname); // no token in the address bar
  showKept();
  settings = await get("api/settings");
  $("names").replaceChildren(...settings.names.map((name) => new Option(name, name)));
  $("format").replaceChildren(...settings.formats.map((name) => new Option(name, name)));
  await listFiles();
});
