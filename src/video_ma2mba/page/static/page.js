// The page: one video at a time, from choosing it to talking about it.

import { $, complain, make, show } from "./dom.js";
import { dropTalk, Talk } from "./talk.js";
import { MemoryList } from "./memories.js";
import * as server from "./server.js";
import { Timeline } from "./timeline.js";
import { clock, parseTime, size } from "./times.js";

// What is shown. `view`: empty, chosen, sending, watching, ready or failed; `file` is what was chosen here, `fileOf` the
// id of its memory; `memory` is what the server said last.
const now = { view: "empty", file: null, fileOf: null, memory: null, began: null, sending: null, unfollow: () => {} };
let model = null;

const timeline = new Timeline($("timeline"), seek);
const talk = new Talk({ subject, onTimes: (marks) => timeline.mark(marks), onSeek: seek });
const list = new MemoryList({
  onOpen: (id) => open(id),
  onRenamed: (memory) => { if (memory.id === now.memory?.id) { now.memory.name = memory.name; title(memory.name); } },
  onDeleted: (id) => { dropTalk(id); if (id === now.memory?.id) start(); },
});

// --- what is seen ---------------------------------------------------------------------------------------------------

function view(name) {
  now.view = name;
  show($("empty"), name === "empty");
  show($("another"), name !== "empty");
  show($("watch-form"), name === "chosen");
  show($("watching"), name === "sending" || name === "watching");
  show($("facts"), name === "ready");
  document.body.dataset.view = name;
}

function title(name) {
  $("film-title").textContent = name ?? "A video";
  document.title = name ? `${name} – Video-Ma²mba` : "Video-Ma²mba";
}

function tell(text) { $("said").textContent = text; }

function clearErrors() {
  for (const id of ["file", "start", "end", "fps", "watch", "question", "list"]) complain(id);
}

// The player with a video, or a still in its place, or nothing.
function stage({ video = null, still = null, note = "" } = {}) {
  const player = $("player");
  if (player.dataset.source !== (video ?? "")) {
    player.dataset.source = video ?? "";
    if (video) player.src = video;
    else { player.removeAttribute("src"); player.load(); }
  }
  show(player, Boolean(video));
  show($("still"), !video && Boolean(still));
  if (!video && still) $("still").src = still;
  show($("stage"), Boolean(video || still));
  show($("stage-note"), Boolean(note));
  $("stage-note").textContent = note;
}

const still = (number) => server.stillUrl(now.memory.id, number);

function seek(seconds, number = timeline.shown ? timeline.nearest(seconds) : 0) {
  if (!$("player").hidden) {
    $("player").currentTime = seconds;
    $("player").scrollIntoView({ block: "nearest" });
  } else if (timeline.shown) {
    $("still").src = still(number);
    $("still").alt = `The picture at ${clock(seconds)}`;
    $("still").scrollIntoView({ block: "nearest" });
  }
  timeline.at(seconds);
}

$("player").addEventListener("timeupdate", () => timeline.at($("player").currentTime));
$("player").addEventListener("error", () => {
  if (!$("player").dataset.source) return;
  const note = now.view === "chosen" || !timeline.shown ? "This browser cannot play this file. It can be watched all the same."
    : "This browser cannot play this video; its pictures can be looked at.";
  stage({ still: timeline.shown && now.memory ? still(0) : null, note });
});

// --- choosing a video -----------------------------------------------------------------------------------------------

function leave() {
  now.unfollow();
  now.sending?.abort();
  Object.assign(now, { memory: null, began: null, sending: null, unfollow: () => {} });
  timeline.clear();
  clearErrors();
  talk.open(null);
  list.select(null);
}

function start() {
  leave();
  if (now.file) URL.revokeObjectURL(now.file.url);
  Object.assign(now, { file: null, fileOf: null });
  $("file").value = "";
  history.replaceState(null, "", location.pathname);
  title();
  stage();
  view("empty");
}

function choose(file) {
  if (!file || !model) return;  // a file dropped before the page is there
  start();
  if (file.size > model.max_bytes) {
    return complain("file", `${file.name} has ${size(file.size)}; at most ${size(model.max_bytes)} are taken here.`);
  }
  if (!file.size) return complain("file", `${file.name} is empty.`);
  now.file = Object.assign(file, { url: URL.createObjectURL(file) });
  for (const id of ["start", "end"]) $(id).value = "";
  title(file.name);
  stage({ video: file.url });
  view("chosen");
  $("watch").focus({ preventScroll: true });
}

$("file").addEventListener("change", () => choose($("file").files[0]));
$("another").addEventListener("click", () => { start(); $("file").focus(); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!model || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}
$("example").addEventListener("click", async () => {
  $("example").disabled = true;
  try {
    choose(await server.example());
  } catch (error) {
    complain("file", error.message);
  } finally {
    $("example").disabled = false;
  }
});

// --- watching it ----------------------------------------------------------------------------------------------------

// The fields under "More", or null where one of them is wrong.
function part() {
  const fields = { name: now.file.name, stills: true }, lasts = $("player").duration;
  for (const id of ["start", "end", "fps"]) complain(id);
  const [from, to, fps] = ["start", "end", "fps"].map((id) => $(id).value.trim());
  const start = from ? parseTime(from) : 0, end = to ? parseTime(to) : null;
  const wrong = (id, text) => { $("more").open = true; complain(id, text); $(id).focus(); return null; };
  if (Number.isNaN(start)) return wrong("start", "Write a time, such as 1:30 or 1:10:00.");
  if (start >= lasts) return wrong("start", `The video is over at ${clock(lasts)}.`);
  if (Number.isNaN(end)) return wrong("end", "Write a time, such as 1:30 or 1:10:00.");
  if (end !== null && end <= start) return wrong("end", `It must lie after ${clock(start)}.`);
  if (fps && !(Number(fps) > 0 && Number(fps) <= 60)) return wrong("fps", "Write a number above 0, up to 60.");
  if (start) fields.start_s = start;
  if (end !== null) fields.end_s = end;
  if (fps) fields.fps = Number(fps);
  return fields;
}

$("watch-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  clearErrors();
  const fields = part(), file = now.file;
  if (!fields) return;
  const sending = now.sending = new AbortController();
  view("sending");
  $("cancel").focus({ preventScroll: true });
  try {
    const memory = await server.upload(file, fields, (share) => {
      $("bar").value = share;
      $("progress").textContent = share < 1 ? `Sending: ${size(share * file.size)} of ${size(file.size)}` : "Looking through it for the time line";
    }, sending.signal);
    if (now.sending !== sending) return;
    now.fileOf = memory.id;
    now.sending = null;
    await attach(memory);
  } catch (error) {
    if (now.sending !== sending) return;
    now.sending = null;
    view("chosen");
    if (error.name !== "AbortError") refused(error);
  }
});

// Next to the field that it is about.
function refused(error) {
  const field = /^(start|end)_s|^fps/i.exec(error.param ?? error.message)?.[0].toLowerCase().replace("_s", "");
  if (field) $("more").open = true;
  const text = error.message.replace(/^start_s=\S+ lies/i, "This lies").replace(/ Choose an earlier start\.$/, "");
  complain(field ?? "file", text);
}

$("cancel").addEventListener("click", async () => {
  const { memory } = now;
  if (now.sending) return now.sending.abort();
  now.unfollow();
  try {
    await server.remove(memory.id);
  } catch (error) {
    if (error.status !== 404) { complain("watch", error.message); return watching(memory); }
  }
  cancelled();
});

function cancelled() {
  const { file } = now;
  leave();
  list.refresh();
  history.replaceState(null, "", location.pathname);
  if (!file) return start();
  title(file.name);
  stage({ video: file.url });
  view("chosen");
  tell("Cancelled.");
}

// Show a memory, also one that is still being watched.
async function attach(memory) {
  now.memory = memory;
  if (now.fileOf !== memory.id && now.file) {
    URL.revokeObjectURL(now.file.url);
    Object.assign(now, { file: null, fileOf: null });
  }
  history.replaceState(null, "", `#memory=${memory.id}`);
  title(memory.name);
  talk.open(memory.id);
  if (memory.status === "ready") ready(memory);
  else if (memory.status === "failed") failed(memory);
  else watching(memory);
  list.refresh().then(() => list.select(now.memory?.id ?? null));
  const [shown, video] = await Promise.all([
    memory.has_stills ? server.stills(memory.id).catch(() => null) : null,
    now.file ? now.file.url : server.hasVideo(memory.id).then((is) => (is ? server.videoUrl(memory.id) : null)),
  ]);
  if (now.memory?.id !== memory.id) return;
  if (shown) timeline.set(shown, still);
  timeline.mark(talk.marks());
  if (video && $("player").dataset.source === video && $("player").error) return;
  const note = video ? "" : shown ? "The video is not kept here; its pictures are." : "Neither the video nor pictures of it are kept here.";
  stage({ video, still: shown ? still(0) : null, note });
}

function watching(memory) {
  view("watching");
  progress(memory);
  now.unfollow = server.follow(memory.id, (said) => {
    if (said === null) { $("progress").textContent = "The server does not answer; trying again."; return; }
    if (said.status === "deleted") return cancelled();
    Object.assign(now.memory, said);
    if (said.status === "ready") ready(now.memory, true);
    else if (said.status === "failed") failed(now.memory);
    else progress(now.memory);
  });
}

const seconds = (memory) => memory.start_s + (memory.progress?.num_frames ?? 0) / (memory.fps || 1);

function progress(memory) {
  list.update(memory);
  const { num_frames: done = 0, expected = null } = memory.progress ?? {};
  if (memory.status === "queued" || !done) {
    $("bar").removeAttribute("value");
    $("progress").textContent = memory.status === "queued" ? "Waits until another video is watched" : "Opening the video";
    timeline.seen(0);
    return;
  }
  now.began ??= { at: performance.now(), done };
  const took = (performance.now() - now.began.at) / 1000, rate = (done - now.began.done) / took;
  const parts = [`${done.toLocaleString("en")}${expected ? ` of ${expected.toLocaleString("en")}` : ""} frames`];
  if (took > 0.5 && rate > 0) {
    parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} a second`);
    if (expected) parts.push(`${clock((expected - done) / rate)} left`);
  }
  $("progress").textContent = parts.join(" · ");
  if (expected) {
    $("bar").value = done / expected;
    timeline.seen(done / expected);
  } else $("bar").removeAttribute("value");
  facts(memory, done);
}

function facts(memory, done) {
  show($("facts"));
  const attention = size(model.attention_bytes_per_token * model.tokens_per_frame * done);
  const frames = `${done.toLocaleString("en")} frame${done === 1 ? "" : "s"}`;
  $("facts").textContent = `The memory of ${now.view === "ready" ? frames : "the video"} takes ${size(model.memory_bytes)}, and takes no more however long the video; attention would need ${attention}${now.view === "ready" ? "" : " by now"}.`;
}

function ready(memory, isNew = false) {
  view("ready");
  timeline.seen(1);
  facts(memory, memory.num_frames);
  if (!isNew) return;
  tell(`Watched: ${memory.num_frames} frames. Ask about it.`);
  list.refresh().then(() => list.select(memory.id));
  if ([document.body, null].includes(document.activeElement)) $("question").focus({ preventScroll: true });
}

function failed(memory) {
  now.unfollow();
  view("failed");
  complain("watch", `This could not be watched: ${memory.error ?? "nobody knows why"}.`.replace(/\.\.$/, "."));
  list.refresh();
}

// --- opening a memory -----------------------------------------------------------------------------------------------

async function open(id) {
  leave();
  try {
    await attach(await server.memory(id));
  } catch (error) {
    start();
    complain("list", error.message);
    list.refresh();
  }
  if (matchMedia("(max-width: 700px)").matches) $("film").scrollIntoView();
}

for (const link of document.querySelectorAll(".top a")) {
  link.addEventListener("click", (event) => { // the address goes on to name the memory
    event.preventDefault();
    const there = document.querySelector(link.hash);
    there.scrollIntoView();
    there.focus({ preventScroll: true });
  });
}

window.addEventListener("hashchange", () => {
  const id = wanted();
  if (id && id !== now.memory?.id) open(id);
});
const wanted = () => /^#memory=([0-9a-f]{32})$/.exec(location.hash)?.[1];

// --- what is asked about --------------------------------------------------------------------------------------------

function subject() {
  const { memory } = now;
  if (now.view === "empty") return "Choose a video first, or open a memory.";
  if (now.view === "chosen") return "Press Watch first. You can ask as soon as something of the video has been seen.";
  if (now.view === "sending") return "The video is still on its way: ask in a moment.";
  if (now.view === "failed") return "This video could not be watched: choose another.";
  if (now.view === "watching" && !memory.progress?.num_frames) return "Nothing of the video has been seen yet: ask in a moment.";
  return { id: memory.id, name: memory.name, soFar: now.view === "watching", seen_s: seconds(memory) };
}

// --- the beginning --------------------------------------------------------------------------------------------------

async function begin() {
  try {
    model = await server.about();
  } catch (error) {
    if (error.status === 401) { show($("key")); $("key-field").focus(); return false; }
    document.body.append(make("p", { class: "card error", role: "alert" }, error.message));
    return true;
  }
  $("model").replaceChildren(make("strong", {}, model.id), model.knows ? `: ${model.knows}` : "");
  $("fps").placeholder = String(model.fps);
  show($("example"));
  $("example-note").textContent = "a minute of coloured shapes";
  talk.examples(model.questions);
  talk.open(null);
  show($("key"), false);
  show($("main"));
  list.refresh();
  view("empty");
  if (wanted()) open(wanted());
  return true;
}

$("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const secure = location.protocol === "https:" ? "; Secure" : "";
  document.cookie = `video_ma2mba_key=${encodeURIComponent($("key-field").value.trim())}; Path=/; SameSite=Strict${secure}`;
  complain("key");
  if (!await begin()) $("key-error").textContent = "This is not a key of this page.";
});

begin();
