// The page of `vfengine serve`: one form, one clip, one list, over the API of the server.

import { ApiError, Unreachable, ask, backoff, changeKey, file, forget, hasKey } from "./api.js";
import { insist, onKeyWanted } from "./api.js";
import { $, bodyOf, fields, fieldsOf, mark, newSeed, setUp, use } from "./form.js";
import { setText, showJobs } from "./jobs.js";
import { setUpStage, showVideo } from "./stage.js";
import { commandLine, fileName, isOver, statusOf, titleOf } from "./words.js";

const PAGE = 20; // clips that are asked for at once
const MOST = 100; // and at most, where so many are under way
const POLL = 500; // ms, until the server names them

let model = null;
let videos = []; // newest first
let tail = null; // the id of the oldest that is listed; one that the address names may be older
let hasMore = false; // whether there are older ones than that
let shownId = location.hash.slice(1) || null;
let pollAfter = null;
let timer = null;
let failures = 0; // polls that were not answered, one after another
let polling = null;
let spoken = ""; // what the live region said last

const shownVideo = () => videos.find(({ id }) => id === shownId) ?? null;

// -- asking ---------------------------------------------------------------------------------------

/** Looks at the list again, and at clips under way that are further down; then plans the next. */
function poll() {
  clearTimeout(timer);
  polling ??= look()
    .then(
      () => {
        failures = 0;
        $("banner").hidden = true;
        if (videos.some((video) => !isOver(video))) later(pollAfter ?? POLL);
      },
      (error) => {
        const wait = error.retryAfter ?? backoff(failures);
        failures += 1;
        $("banner").hidden = false;
        const seconds = Math.max(1, Math.round(wait / 1000));
        setText($("banner-text"), `${error.message} Trying again in ${seconds} s.`);
        later(wait);
      },
    )
    .finally(() => (polling = null));
  return polling;
}

/** Polls after so many ms; a tab that is hidden polls once it is seen again. */
function later(ms) {
  clearTimeout(timer);
  timer = document.hidden ? null : setTimeout(poll, ms);
}

async function look() {
  if (!model) await meet();
  const began = changes;
  const depth = videos.findLastIndex((video) => !isOver(video)) + 1;
  const limit = Math.min(MOST, Math.max(PAGE, depth));
  const { value, pollAfter: after } = await ask(`v1/videos?limit=${limit}&order=desc`);
  pollAfter = after ?? pollAfter;
  const edge = videos.findIndex(({ id }) => id === value.last_id);
  const older = value.has_more && edge >= 0 ? videos.slice(edge + 1) : [];
  const list = [...value.data, ...older];
  const place = list.findIndex(({ id }) => id === shownId);
  if (shownId !== null && (place < 0 || (place >= value.data.length && !isOver(list[place])))) {
    const shown = await lookAt(shownId); // older than what was listed, as the address may name one
    list.splice(place < 0 ? list.length : place, place < 0 ? 0 : 1, ...(shown ? [shown] : []));
  }
  if (changes !== began) return; // the list is older than what was done meanwhile
  if (edge < 0 || edge > videos.findIndex(({ id }) => id === tail) || !value.has_more) {
    tail = value.last_id;
    hasMore = value.has_more;
  }
  setVideos(list);
}

/** A clip as it is now; null once it is gone. */
async function lookAt(id) {
  try {
    return (await ask(`v1/videos/${encodeURIComponent(id)}`)).value;
  } catch (error) {
    if (error instanceof ApiError && error.status < 500) return null;
    throw error;
  }
}

async function meet() {
  const { value } = await ask("v1/models");
  model = value.data[0];
  setUp(model, { shownVideo, onError: showFormError });
  setUpStage(model);
  const size = `${model.width} × ${model.height}, ${model.num_frames} frames`;
  setText($("model-line"), `${model.id} · ${size}`);
  $("generate").disabled = false;
}

let changes = 0; // made by this page, so that an older answer does not undo them

function setVideos(list) {
  const gone = videos.filter(({ id }) => !list.some((video) => video.id === id));
  gone.forEach(({ id }) => forget(id));
  videos = list;
  if (!shownVideo() && shownId !== null) shownId = null;
  if (shownId === null && videos.length > 0) shownId = videos[0].id;
  render();
}

function put(video) {
  changes += 1;
  setVideos([video, ...videos.filter(({ id }) => id !== video.id)]);
}

function render() {
  const video = shownVideo();
  showJobs(videos, shownId, { onPick: show, onStop: remove });
  showVideo(video);
  $("more").hidden = !hasMore;
  $("change-key").hidden = !hasKey();
  const address = shownId ? `#${shownId}` : "";
  if (location.hash !== address) {
    history.replaceState(null, "", address || location.pathname + location.search);
  }
  if (video?.status === "completed") offerDownload(video);
  if (video) announce(`${titleOf(video)}: ${statusOf(video)}`);
}

function offerDownload(video) {
  const link = $("download");
  link.download = fileName(video);
  if (link.dataset.of === video.id) return;
  link.dataset.of = video.id;
  link.removeAttribute("href");
  file(video.id, "video").then(
    ({ url }) => link.dataset.of === video.id && (link.href = url),
    () => delete link.dataset.of,
  );
}

// -- saying ---------------------------------------------------------------------------------------

/** Says it to those who cannot see it, once. */
function announce(text) {
  if (text === spoken) return;
  spoken = text;
  $("live").textContent = text;
}

let toasting = null;

function toast(text) {
  announce(text);
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => ($("toast").hidden = true), 2500);
}

function showError(element, text) {
  element.hidden = !text;
  setText(element, text ?? "");
}

const showFormError = (text) => showError($("form-error"), text);
const showActionError = (text) => showError($("action-error"), text);

// -- doing ----------------------------------------------------------------------------------------

function show(id) {
  if (id !== shownId) {
    shownId = id;
    closeExtend();
    showActionError(null);
    beSure(false);
  }
  render();
}

let making = null; // AbortController of the request for a clip that is under way

/** Asks for a clip and shows it; say: where an error goes. True once it is accepted. */
async function make(path, request, say) {
  if (making) return false;
  making = new AbortController();
  say(null);
  mark(null);
  const busy = [$("generate"), $("another-motion"), $("another-look")];
  for (const button of busy) button.setAttribute("aria-disabled", "true");
  const waiting = (message, wait) => {
    $("waiting").hidden = message === null;
    const seconds = Math.max(1, Math.round(wait / 1000));
    if (message !== null) setText($("waiting-text"), `${message} Trying again in ${seconds} s.`);
  };
  try {
    const { signal } = making;
    const { value, pollAfter: after } = await insist(path, { ...request, signal, waiting });
    pollAfter = after ?? pollAfter;
    put(value);
    show(value.id);
    later(pollAfter ?? POLL);
    return true;
  } catch (error) {
    if (error.name === "AbortError") toast("Given up.");
    else {
      say(error.message);
      if (say === showFormError) mark(error.param);
    }
    return false;
  } finally {
    $("waiting").hidden = true;
    making = null;
    for (const button of busy) button.removeAttribute("aria-disabled");
  }
}

async function generate(event) {
  event.preventDefault();
  if (!model) return;
  const made = await make("v1/videos", { body: bodyOf(fields()) }, showFormError);
  if (made && matchMedia("(max-width: 46rem)").matches) {
    $("screen").scrollIntoView({ block: "center" });
  }
}

function anotherMotion() {
  const path = `v1/videos/${shownId}/remix`;
  make(path, { json: { residual_seed: Number(newSeed()) } }, showActionError);
}

function anotherLook() {
  const seed = model.kind === "text" ? "seed" : model.has_base ? "base_seed" : "residual_seed";
  const values = { ...fieldsOf(shownVideo()), [seed]: newSeed() };
  make("v1/videos", { body: bodyOf(values, null) }, showActionError);
}

function openExtend() {
  const open = $("extend-form").hidden;
  $("extend-form").hidden = !open;
  $("extend").setAttribute("aria-expanded", String(open));
  if (!open) return;
  // half of a clip of the trained length goes on from the last frame
  const most = Math.max(1, Math.floor(model.num_frames / 2));
  $("extend-by").value = Number((most / model.fps).toFixed(4));
  $("extend-by").focus();
}

function closeExtend() {
  $("extend-form").hidden = true;
  $("extend").setAttribute("aria-expanded", "false");
}

async function extend(event) {
  event.preventDefault();
  const video = shownVideo();
  const body = new FormData();
  body.set("video[id]", video.id);
  body.set("seconds", $("extend-by").value);
  if (video.label) body.set("label", video.label);
  else if (video.prompt) body.set("prompt", video.prompt);
  if (await make("v1/videos/extensions", { body }, showActionError)) closeExtend();
}

/** Stops a clip that is not done, or deletes one that is. */
async function remove(id) {
  const over = isOver(videos.find((video) => video.id === id) ?? { status: "completed" });
  showActionError(null);
  try {
    await ask(`v1/videos/${id}`, { method: "DELETE" });
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) {
      return id === shownId ? showActionError(error.message) : toast(error.message);
    }
  }
  changes += 1;
  const place = videos.findIndex((video) => video.id === id);
  const list = videos.filter((video) => video.id !== id);
  if (id === tail) tail = list[place - 1]?.id ?? null;
  if (id === shownId) shownId = (list[place] ?? list[place - 1])?.id ?? null;
  setVideos(list);
  toast(over ? "Deleted." : "Stopped.");
}

/** Deletes the shown clip at the second press, unless it is not done yet. */
function removeShown() {
  const sure = $("delete").dataset.sure || !isOver(shownVideo());
  beSure(!sure);
  if (sure) remove(shownId);
}

let doubting = null;

/** Whether the next press deletes; for a while. */
function beSure(sure) {
  clearTimeout(doubting);
  if (sure) {
    $("delete").dataset.sure = "true";
    setText($("delete"), "Press again to delete");
    doubting = setTimeout(() => beSure(false), 4000);
  } else {
    delete $("delete").dataset.sure;
    setText($("delete"), "Delete");
  }
}

async function copyCommand() {
  const line = commandLine(shownVideo(), model);
  try {
    await navigator.clipboard.writeText(line);
    toast("Copied.");
  } catch {
    // no clipboard without https or localhost, and none if the user says no
    window.prompt("The command line:", line);
  }
}

async function useSettings() {
  const video = shownVideo();
  const base = video.animates_picture ? await file(video.id, "thumbnail").catch(() => null) : null;
  use(video, base && new File([base.blob], "base frame.png", { type: base.blob.type }));
  const first = [$("prompt"), $("label")].find((input) => input.offsetParent) ?? $("generate");
  first.focus();
  toast("The form has the settings of this clip.");
}

async function showMore() {
  $("more").disabled = true;
  try {
    const { value } = await ask(`v1/videos?limit=${PAGE}&order=desc&after=${tail}`);
    const next = videos.findIndex(({ id }) => id === tail) + 1;
    const fresh = new Set(value.data.map(({ id }) => id));
    const [before, after] = [videos.slice(0, next), videos.slice(next)];
    tail = value.last_id ?? tail;
    hasMore = value.has_more;
    changes += 1;
    setVideos([...before, ...value.data, ...after.filter(({ id }) => !fresh.has(id))]);
  } catch (error) {
    toast(error.message);
  } finally {
    $("more").disabled = false;
  }
}

/** Shows the dialog that asks for a key, until there is one. */
function wantKey(message) {
  const dialog = $("key-dialog");
  showError($("key-error"), message);
  if (!dialog.open) dialog.showModal();
  $("key").select();
  return new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const given = $("key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(given)) {
        showError($("key-error"), "A key has letters, digits and signs, and no blanks.");
        return;
      }
      dialog.close();
      $("key").value = "";
      resolve(given);
    };
  });
}

// -- wiring ---------------------------------------------------------------------------------------

onKeyWanted(wantKey);
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
$("change-key").addEventListener("click", () => changeKey("").then(poll));
$("form").addEventListener("submit", generate);
$("waiting-cancel").addEventListener("click", () => making?.abort());
$("another-motion").addEventListener("click", anotherMotion);
$("another-look").addEventListener("click", anotherLook);
$("extend").addEventListener("click", openExtend);
$("extend-form").addEventListener("submit", extend);
$("use-settings").addEventListener("click", useSettings);
$("copy-command").addEventListener("click", copyCommand);
$("delete").addEventListener("click", removeShown);
$("more").addEventListener("click", showMore);
$("banner-retry").addEventListener("click", poll);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else poll();
});
window.addEventListener("online", poll);
window.addEventListener("hashchange", () => {
  const id = location.hash.slice(1);
  if (videos.some((video) => video.id === id)) show(id);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  $("form").requestSubmit();
});
$("generate").disabled = true;
poll();
