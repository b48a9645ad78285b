// The clip that is shown: its base frame as soon as that is there, then the clip, in a loop.

import { file } from "./api.js";
import { $ } from "./form.js";
import { setText } from "./jobs.js";
import { bytes, clock, duration, isExtended, isOver } from "./words.js";
import { motionSeed, noCommand, statusOf, titleOf } from "./words.js";

const still = matchMedia("(prefers-reduced-motion: reduce)");
let shown = { id: null, state: null }; // what the screen holds or is about to hold
let playing = true;
let urls = {}; // of the shown clip: thumbnail, video
let model = null;

export function setUpStage(info) {
  model = info;
  $("screen").style.setProperty("--ratio", `${model.width} / ${model.height}`);
  $("play").addEventListener("click", () => play(!playing));
  const video = $("clip-video");
  video.addEventListener("loadeddata", () => reveal(video));
  video.addEventListener("error", () => {
    if (video.getAttribute("src")) say("This browser cannot play the clip. Download it instead.");
  });
  $("clip-image").addEventListener("load", () => reveal($("clip-image")));
}

/** Shows a clip in its present state; null: none. */
export function showVideo(video) {
  $("about").hidden = !video;
  const state = stateOf(video);
  if (video?.id !== shown.id) {
    clear();
    shown = { id: video?.id ?? null, state: null };
  }
  if (state !== shown.state) {
    shown.state = state;
    $("screen").dataset.state = state;
    if (video && state !== "failed" && video.has_thumbnail) showBase(video);
    if (state === "done") showClip(video);
  }
  const bar = $("screen-progress");
  bar.hidden = video?.status !== "in_progress";
  bar.dataset.phase = video?.phase ?? "";
  bar.value = video?.progress ?? 0;
  badge(state === "base" ? "base frame" : "");
  if (state === "empty") say("Your clip will be here.");
  else if (state === "waiting") say(capital(statusOf(video)));
  else if (state === "failed") say("This clip failed.");
  else if (state === "base") say("");
  if (video) describe(video);
}

function stateOf(video) {
  if (!video) return "empty";
  if (video.status === "failed") return "failed";
  if (video.status === "completed") return "done";
  return video.has_thumbnail ? "base" : "waiting";
}

function clear() {
  for (const id of ["base-frame", "clip-image", "clip-video"]) {
    $(id).hidden = true;
    $(id).removeAttribute("src");
  }
  $("clip-video").load();
  $("play").hidden = true;
  urls = {};
  say("");
}

function showBase(video) {
  const image = $("base-frame");
  if (image.getAttribute("src")) return;
  get(video.id, "thumbnail").then((url) => {
    if (!url) return;
    image.src = url;
    image.alt = `Base frame: ${titleOf(video)}`;
    if ($("play").hidden) image.hidden = false;
    else play(playing); // the clip was there first
  });
}

function showClip(video) {
  if ($("base-frame").hidden) say("Loading the clip");
  get(video.id, "video").then((url) => {
    if (!url) return;
    const media = mediaOf(video);
    media.setAttribute("aria-label", `Clip: ${titleOf(video)}`);
    if (media === $("clip-image")) media.alt = `Clip: ${titleOf(video)}`;
    playing = !still.matches;
    if (media === $("clip-video")) media.autoplay = playing;
    media.src = url;
  });
}

/** The URL of a file of the shown clip; null once another clip is shown, or for an error. */
async function get(id, variant) {
  try {
    const { url } = await file(id, variant);
    if (shown.id !== id) return null;
    urls[variant] = url;
    return url;
  } catch (error) {
    if (shown.id === id) {
      say(error.message);
      shown.state = null; // the next look at the clip tries again
    }
    return null;
  }
}

const isPicture = (video) => ["gif", "webp", "png"].includes(video.format);
const mediaOf = (video) => $(isPicture(video) ? "clip-image" : "clip-video");

function reveal(media) {
  if (!media.getAttribute("src")) return;
  say("");
  media.hidden = false;
  $("play").hidden = false;
  play(playing);
}

/** Lets the clip run, or holds it; a picture that moves is held by its base frame. */
function play(on) {
  playing = on;
  const [video, image] = [$("clip-video"), $("clip-image")];
  if (video.getAttribute("src")) {
    if (on) video.play().catch(() => {});
    else video.pause();
  }
  if (image.getAttribute("src")) image.hidden = !on && Boolean(urls.thumbnail);
  $("base-frame").hidden = !urls.thumbnail || !(image.getAttribute("src") && !on);
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  $("play").querySelector("use").setAttribute("href", on ? "#i-pause" : "#i-play");
}

function say(text) {
  setText($("screen-text"), text);
}

function badge(text) {
  $("screen-badge").hidden = text === "";
  setText($("screen-badge"), text);
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function describe(video) {
  const done = video.status === "completed";
  setText($("about-prompt"), titleOf(video));
  setText($("about-status"), isOver(video) ? "" : `${capital(statusOf(video))} · ${video.progress} %`);
  $("about-error").hidden = video.status !== "failed";
  setText($("about-error"), video.error?.message ?? "");
  const extended = isExtended(video);
  $("another-motion").hidden = !done || !model.has_base;
  $("another-look").hidden = video.status === "queued" || Boolean(video.animates_picture) || extended;
  $("another-look").lastChild.textContent = model.has_base ? "Another look" : "Another clip";
  $("extend").hidden = !done || !model.has_base || !model.animates_pictures;
  $("download").hidden = !done;
  $("copy-command").hidden = noCommand(video) !== null;
  const word = isOver(video) ? "Delete" : "Stop";
  if (!$("delete").dataset.sure) setText($("delete"), word);
  const facts = factsOf(video);
  const key = JSON.stringify(facts);
  if ($("facts").dataset.key === key) return;
  $("facts").dataset.key = key;
  $("facts").replaceChildren(...facts.map(([name, value]) => pair(name, value)));
}

function factsOf(video) {
  const memory = video.peak_memory_mb;
  const all = [
    ["Look", model.has_base && (video.animates_picture ? "picture" : video.base_seed)],
    [model.has_base ? "Motion" : "Seed", motionSeed(video, model)],
    ["Steps", video.num_inference_steps],
    ["Guidance", video.guidance_scale],
    ["Solver", video.solver],
    ["Frames", video.num_frames && `${video.num_frames} at ${video.fps} a second`],
    ["Size", String(video.size).replace("x", " × ")],
    ["Avoids", video.negative_prompt],
    ["Asked for", clock(video.created_at)],
    ["Made in", video.inference_time_s && duration(video.inference_time_s)],
    ["Memory", memory && bytes(memory * 1e6)],
    ["Kept until", video.expires_at && clock(video.expires_at)],
  ];
  return all.filter(([, value]) => value || value === 0);
}

function pair(name, value) {
  const group = document.createElement("div");
  const [term, text] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = name;
  text.textContent = value;
  group.append(term, text);
  return group;
}
