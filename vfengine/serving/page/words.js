// What a clip is called, and how it is made elsewhere: words, file names, the command line.

const PHASES = {
  text: "reading the prompt",
  base: "making the look",
  residual: "making the motion",
  video: "making the frames",
  decode: "writing the clip",
};

export const isOver = (video) => video.status === "completed" || video.status === "failed";

/** Whether a clip goes on from another, or from one that was sent (extends is ""). */
export const isExtended = (video) => video.extends != null;

/** The seed of the motion; of a text-to-video model, the only one. */
export const motionSeed = (video, model) =>
  model.kind === "text" ? video.seed : video.residual_seed;

/** What a clip shows, in the words of its request. */
export const titleOf = (video) => video.label || video.prompt || "no prompt";

/** The state of a clip, in words. */
export function statusOf(video) {
  if (video.status === "queued") {
    const ahead = video.queue_position - 1;
    if (!(ahead > 0)) return "waiting, next";
    return ahead === 1 ? "waiting, one ahead" : `waiting, ${ahead} ahead`;
  }
  if (video.status === "in_progress") return PHASES[video.phase] ?? "starting";
  if (video.status === "failed") return "failed";
  return "done";
}

/** 12:05 today, "26 Nov, 12:05" before. unix: seconds */
export function clock(unix) {
  const date = new Date(unix * 1000);
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Number(seconds).toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

export function bytes(count) {
  if (count < 1e6) return `${Math.max(1, Math.round(count / 1e3))} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

/** A file name of the first words: "a-person-kicking-3-4.mp4". */
export function fileName(video) {
  const words = titleOf(video).toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["clip"];
  const seeds = [video.base_seed, video.residual_seed].filter((seed) => seed != null);
  return `${[...words.slice(0, 6), ...seeds].join("-").slice(0, 100)}.${video.format ?? "mp4"}`;
}

/** Why no command line makes this clip; null if one does. */
export function noCommand(video) {
  if (isExtended(video)) return "An extended clip has no command line.";
  if (video.look) return "This clip has the look of another prompt.";
  return null;
}

/**
 * The command line that makes a clip, quoted for a shell. A picture is not part of it: its file
 * stands as picture.png.
 */
export function commandLine(video, model) {
  const flags = [];
  const add = (name, value) => {
    if (value === undefined || value === null || value === "") return;
    const text = String(value);
    // a value that looks like a flag must be joined to its own
    flags.push(text.startsWith("-") ? `${name}=${quote(text)}` : `${name} ${quote(text)}`);
  };
  // the shipped model is what the command takes by itself
  if (model.id !== "vfengine") add("--model", model.id);
  if (video.label) add("--label", video.label);
  else add("--prompt", video.prompt);
  add("--negative-prompt", video.negative_prompt);
  if (video.animates_picture) add("--image", "picture.png");
  if (model.kind === "text") add("--seed", motionSeed(video, model));
  else {
    if (model.has_base && !video.animates_picture) add("--base-seed", video.base_seed);
    add("--residual-seed", video.residual_seed);
  }
  add("--num-frames", video.num_frames);
  add("--num-inference-steps", video.num_inference_steps);
  add("--guidance-scale", video.guidance_scale);
  add("--solver", video.solver);
  if (video.eta) add("--eta", video.eta);
  if (model.has_base && !video.animates_picture) add("--base-path", video.base_path);
  add("--fps", video.fps);
  if (video.scale > 1) add("--scale", video.scale);
  add("--output", fileName(video));
  return ["vfengine generate", ...flags].join(" ");
}

/** A word of a POSIX shell. */
export const quote = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
