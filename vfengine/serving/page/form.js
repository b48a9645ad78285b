// The form: what the next clip shows and how it is made.

import { isExtended, motionSeed } from "./words.js";

export const $ = (id) => document.getElementById(id);

const SEEDS = { base_seed: "keep-look", residual_seed: "keep-motion" };
let model = null;
let picture = null; // File
let pictureUrl = null;

/** A seed of 32 bits. */
export const newSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

/** Shows the fields that this model has, with its defaults. */
export function setUp(info, { shownVideo, onError }) {
  model = info;
  const prompts = model.takes_prompts;
  $("prompt-field").hidden = !prompts;
  $("label-field").hidden = prompts || model.labels.length === 0;
  $("negative-field").hidden = !prompts || !model.takes_negatives;
  $("picture-field").hidden = !model.animates_pictures;
  $("base_seed-field").hidden = !model.has_base;
  if (!model.has_base) $("motion-name").textContent = "Seed";
  fill($("label"), model.labels);
  $("label-offer").hidden = !prompts || model.labels.length === 0;
  fill($("label-offer"), ["", ...model.labels], (label) => label || "Labels");
  fill($("solver"), model.solvers);
  fill($("format"), model.formats);
  const scales = Array.from({ length: model.max_scale }, (_, index) => index + 1);
  fill($("size"), scales.map(sizeAt), (size) => size.replace("x", " × "));
  bound($("seconds"), { min: frames(1), max: frames(model.max_num_frames), step: frames(1) });
  bound($("num_inference_steps"), {
    min: model.min_num_inference_steps,
    max: model.max_num_inference_steps,
  });
  bound($("guidance_scale"), { min: model.min_guidance_scale, max: model.max_guidance_scale });
  reset();

  $("label-offer").addEventListener("change", () => {
    if ($("label-offer").value) $("prompt").value = $("label-offer").value;
    $("label-offer").value = "";
    $("prompt").focus();
  });
  $("seconds").addEventListener("input", countFrames);
  for (const [name, keep] of Object.entries(SEEDS)) {
    $(name).addEventListener("input", () => ($(keep).checked = $(name).value.trim() !== ""));
    $(keep).addEventListener("change", () => {
      const video = shownVideo();
      const shown = video && (name === "base_seed" ? video.base_seed : motionSeed(video, model));
      setSeed(name, $(keep).checked ? (shown ?? newSeed()) : "");
    });
  }
  for (const button of document.querySelectorAll("[data-dice]")) {
    button.addEventListener("click", () => setSeed(button.dataset.dice, newSeed()));
  }
  if (model.animates_pictures) takePictures(onError);
}

const frames = (count) => Number((count / model.fps).toFixed(4));
const sizeAt = (scale) => `${model.width * scale}x${model.height * scale}`;

function fill(select, values, word = (value) => value) {
  select.replaceChildren(...values.map((value) => new Option(word(value), value)));
}

function bound(input, limits) {
  for (const [name, value] of Object.entries(limits)) {
    input.setAttribute(name, value);
  }
}

function reset() {
  $("seconds").value = frames(model.num_frames);
  $("num_inference_steps").value = model.num_inference_steps;
  $("guidance_scale").value = model.guidance_scale;
  $("solver").value = model.solver;
  countFrames();
}

function countFrames() {
  const count = numFrames();
  const trained = count === model.num_frames ? "" : ` (trained on ${model.num_frames})`;
  $("frames-hint").textContent =
    count > 0 ? `${count} ${count === 1 ? "frame" : "frames"} at ${model.fps} a second${trained}` : "";
}

const numFrames = () => Math.round(Number($("seconds").value) * model.fps);

function setSeed(name, value) {
  $(name).value = value;
  $(SEEDS[name]).checked = value !== "";
}

/** What the form says, as fields of a request; what is empty is left out. */
export function fields() {
  const values = {};
  const put = (name, value) => {
    if (value !== "" && value != null) values[name] = String(value);
  };
  if (model.takes_prompts) {
    const text = $("prompt").value.trim();
    put(model.labels.includes(text) ? "label" : "prompt", text);
    put("negative_prompt", $("negative_prompt").value.trim());
  } else put("label", $("label").value);
  if (model.has_base && !picture) put("base_seed", $("base_seed").value.trim());
  const motion = $("residual_seed").value.trim();
  put(model.kind === "text" ? "seed" : "residual_seed", motion);
  for (const name of ["num_inference_steps", "guidance_scale", "solver", "size", "format"]) {
    put(name, $(name).value);
  }
  if ($("seconds").value !== "") put("num_frames", numFrames());
  return values;
}

/** The body of a request for these fields, with the picture that is chosen. */
export function bodyOf(values, withPicture = picture) {
  const body = new FormData();
  body.set("model", model.id);
  for (const [name, value] of Object.entries(values)) body.set(name, value);
  if (withPicture) body.set("input_reference", withPicture, withPicture.name || "picture.png");
  return body;
}

/** The fields that made a clip, so that another can be made like it. */
export function fieldsOf(video) {
  const names = [
    ...["label", "prompt", "negative_prompt", "residual_seed", "num_frames", "solver"],
    ...["num_inference_steps", "guidance_scale", "size", "format", "base_path", "fps"],
  ];
  if (video.eta) names.push("eta");
  if (!video.animates_picture) names.push("base_seed");
  const given = names.filter((name) => video[name] != null && video[name] !== "");
  const values = Object.fromEntries(given.map((name) => [name, String(video[name])]));
  if (values.label) delete values.prompt;
  if (!model.has_base) for (const name of ["base_seed", "base_path"]) delete values[name];
  if (model.kind === "text") {
    values.seed = String(motionSeed(video, model));
    delete values.residual_seed;
  }
  return values;
}

/** Puts the settings of a clip into the form. base: its base frame, if a picture was animated */
export function use(video, base) {
  const shown = video.label || video.prompt || "";
  if (model.takes_prompts) $("prompt").value = shown;
  else $("label").value = shown;
  $("negative_prompt").value = video.negative_prompt ?? "";
  setSeed("base_seed", video.animates_picture ? "" : String(video.base_seed ?? ""));
  setSeed("residual_seed", String(motionSeed(video, model) ?? ""));
  // an extended clip is longer than what is made at once
  $("seconds").value = frames(isExtended(video) ? model.num_frames : video.num_frames);
  for (const name of ["num_inference_steps", "guidance_scale", "solver", "format"]) {
    if (video[name] != null) $(name).value = video[name];
  }
  $("size").value = sizeAt(video.scale);
  countFrames();
  setPicture(base);
}

/** Marks the field that the API complained about; null: none. */
export function mark(param) {
  const names = { prompt: "prompt", label: model.takes_prompts ? "prompt" : "label" };
  Object.assign(names, { num_frames: "seconds", input_reference: "picture", seed: "residual_seed" });
  for (const input of $("form").elements) input.removeAttribute("aria-invalid");
  const input = $(names[param] ?? param ?? "");
  if (!input || input.form !== $("form")) return;
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", "form-error");
  input.focus();
}

// -- the picture ----------------------------------------------------------------------------------

function setPicture(file) {
  if (pictureUrl) URL.revokeObjectURL(pictureUrl);
  picture = file ?? null;
  pictureUrl = picture && URL.createObjectURL(picture);
  const preview = $("picture-preview");
  if (picture) {
    preview.src = pictureUrl;
    preview.alt = "The picture to animate";
  } else preview.removeAttribute("src");
  preview.hidden = !picture;
  $("picture").value = "";
  $("picture-remove").hidden = !picture;
  $("picture-text").replaceChildren(...(picture ? [picture.name || "Picture"] : invitation()));
  $("base_seed-field").classList.toggle("off", picture !== null);
  for (const id of ["base_seed", "keep-look"]) $(id).disabled = picture !== null;
  document.querySelector("[data-dice=base_seed]").disabled = picture !== null;
  $("base_seed").placeholder = picture ? "the picture" : "random";
}

function invitation() {
  const choose = document.createElement("u");
  choose.textContent = "choose";
  return ["Drop, paste or ", choose, " a picture"];
}

function takePictures(onError) {
  const drop = $("drop");
  const take = (files) => {
    const file = [...files].find(({ type }) => type.startsWith("image/"));
    if (file) setPicture(file);
    else if (files.length > 0) onError("That is no picture.");
    return Boolean(file);
  };
  $("picture").addEventListener("change", () => take($("picture").files));
  $("picture-remove").addEventListener("click", () => {
    setPicture(null);
    $("picture").focus();
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length && take(event.clipboardData.files)) event.preventDefault();
  });
  let inside = 0; // elements of the page that the dragged file is over
  const over = (change) => {
    inside = Math.max(0, inside + change);
    drop.classList.toggle("over", inside > 0);
  };
  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (event) => isFile(event) && over(1));
  document.addEventListener("dragleave", (event) => isFile(event) && over(-1));
  document.addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    over(-inside);
    take(event.dataTransfer.files);
  });
}
