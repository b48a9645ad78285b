// The list of clips: what waits, what is being made, what is done.

import { file } from "./api.js";
import { $ } from "./form.js";
import { clock, duration, isOver, statusOf, titleOf } from "./words.js";

const rows = new Map(); // id -> li

/** Shows these clips, in this order. onPick, onStop: called with a clip's id */
export function showJobs(videos, shownId, { onPick, onStop }) {
  const present = new Set(videos.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (present.has(id)) continue;
    const focused = row.contains(document.activeElement);
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    rows.delete(id);
    if (focused) (next?.querySelector(".pick") ?? $("generate")).focus();
  }
  let before = $("jobs").firstElementChild;
  for (const video of videos) {
    let row = rows.get(video.id);
    if (!row) {
      row = newRow(video.id, onPick, onStop);
      rows.set(video.id, row);
    }
    if (row === before) before = before.nextElementSibling;
    else $("jobs").insertBefore(row, before);
    update(row, video, video.id === shownId);
  }
  const active = videos.filter((video) => !isOver(video)).length;
  $("jobs-count").textContent = active ? `${active} under way` : "";
  $("jobs-empty").hidden = videos.length > 0;
}

function newRow(id, onPick, onStop) {
  const row = $("job-template").content.firstElementChild.cloneNode(true);
  row.dataset.id = id;
  row.querySelector(".pick").addEventListener("click", () => onPick(id));
  row.querySelector(".stop").addEventListener("click", () => onStop(id));
  return row;
}

function update(row, video, shown) {
  const [pick, stop] = [row.querySelector(".pick"), row.querySelector(".stop")];
  const [title, over] = [titleOf(video), isOver(video)];
  row.dataset.status = video.status;
  row.dataset.phase = video.phase ?? "";
  if (shown) pick.setAttribute("aria-current", "true");
  else pick.removeAttribute("aria-current");
  setText(row.querySelector(".job-prompt"), title);
  setText(row.querySelector(".job-status"), lineOf(video));
  const bar = row.querySelector("progress");
  bar.hidden = video.status !== "in_progress";
  bar.value = video.progress;
  bar.setAttribute("aria-label", `Progress of ${title}`);
  stop.hidden = over;
  stop.setAttribute("aria-label", `Stop ${title}`);
  stop.title = "Stop";
  const image = row.querySelector("img");
  if (video.has_thumbnail && !image.dataset.wanted) {
    image.dataset.wanted = "true";
    file(video.id, "thumbnail").then(
      ({ url }) => {
        image.src = url;
        image.hidden = false;
      },
      () => delete image.dataset.wanted, // the next look at the list tries again
    );
  }
}

function lineOf(video) {
  if (video.status === "in_progress") return `${statusOf(video)} · ${video.progress} %`;
  if (video.status === "queued") return statusOf(video);
  const time = clock(video.completed_at ?? video.created_at);
  if (video.status === "failed") return `failed · ${time}`;
  const took = video.inference_time_s ? ` · ${duration(video.inference_time_s)}` : "";
  return `${time}${took}`;
}

/** Changes a text only if it differs, so that nothing is announced or laid out twice. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
