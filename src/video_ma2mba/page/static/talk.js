// The talk beside the video. What was said before counts; it is kept in this browser, under the id of the memory.

import { $, complain, make, saveFile, show } from "./dom.js";
import * as server from "./server.js";
import { clock, timesIn } from "./times.js";

const KEPT = "video-ma2mba talk ";

export class Talk {
  // subject() is { id, name, soFar, seen_s } of what is asked about, or a sentence that says why nothing can be asked yet;
  // onTimes(marks) and onSeek(seconds) as of the time line.
  constructor({ subject, onTimes, onSeek }) {
    Object.assign(this, { subject, onTimes, onSeek, id: null, turns: [], waiting: Promise.resolve(), stopping: null });
    $("ask").addEventListener("submit", (event) => { event.preventDefault(); this.ask($("question").value); });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask($("question").value);
    });
    $("question").addEventListener("input", () => { complain("question"); this.#fit(); });
    $("stop").addEventListener("click", () => this.stopping?.abort());
    $("forget").addEventListener("click", () => this.#forget());
    $("export-talk").addEventListener("click", () => this.#export());
  }

  examples(questions) {
    $("examples").replaceChildren(...questions.map((text) =>
      make("button", { type: "button", class: "chip", onclick: () => this.ask(text) }, text)));
  }

  // Go on with the talk about a memory; null: there is none.
  open(id) {
    if (id === this.id) return;
    this.stopping?.abort();
    this.id = id;
    this.turns = id ? read(id) : [];
    this.#draw();
  }

  ask(text) {
    const question = text.trim(), subject = this.subject();
    complain("question", !question ? "Type a question first." : typeof subject === "string" ? subject : "");
    if (!question || typeof subject === "string") return $("question").focus();
    const turn = { question, answer: "" }, id = this.id;
    this.turns.push(turn);
    if (text === $("question").value) $("question").value = "";
    this.#fit();
    this.#draw();
    // one after another: an answer may rest on the one before
    this.waiting = this.waiting.then(() => this.#answer(turn, id)).catch((error) => console.error(error));
  }

  async #answer(turn, id) {
    const subject = this.subject();
    if (id !== this.id || typeof subject === "string" || !this.turns.includes(turn)) return;
    const stopping = this.stopping = new AbortController();
    const entry = this.entries.get(turn);
    if (subject.soFar) turn.until_s = subject.seen_s;
    show($("stop"));
    entry.setAttribute("aria-busy", "true");
    try {
      for await (const piece of server.answer(this.#messages(turn, subject), stopping.signal)) {
        turn.answer += piece;
        this.#drawAnswer(turn);
      }
    } catch (error) {
      if (error.name === "AbortError") turn.stopped = true;
      else this.#failed(turn, error);
    } finally {
      entry.removeAttribute("aria-busy");
      if (this.stopping === stopping) { this.stopping = null; show($("stop"), false); }
    }
    if (id === this.id) {
      this.#keep();
      this.#draw();
    }
  }

  // A question that was not answered is given back, with a sentence beside it.
  #failed(turn, error) {
    const code = { context_length_exceeded: "The talk has become too long: begin it anew, or ask more briefly.",
      nothing_seen: "Nothing of the video has been seen yet: ask again in a moment." }[error.code];
    this.turns = this.turns.filter((one) => one !== turn);
    if (!$("question").value) $("question").value = turn.question;
    complain("question", code ?? error.message);
    this.#fit();
  }

  #messages(turn, subject) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter((one) => one.answer);
    const messages = [...before.flatMap((one) => [
      { role: "user", content: one.question }, { role: "assistant", content: one.answer },
    ]), { role: "user", content: turn.question }];
    const part = { type: "memory", id: subject.id, ...(subject.soFar ? { so_far: true } : {}) };
    messages[0].content = [part, { type: "text", text: messages[0].content }];
    return messages;
  }

  #draw() {
    this.entries = new Map();
    $("turns").replaceChildren(...this.turns.flatMap((turn) => {
      const question = make("li", { class: "question" }, make("span", { class: "hidden" }, "You asked: "), ...this.#linked(turn.question));
      const answer = make("li", { class: "answer" });
      this.entries.set(turn, answer);
      this.#drawAnswer(turn);
      return [question, answer];
    }));
    show($("examples"), !this.turns.length);
    show($("export-talk"), this.turns.length > 0);
    show($("forget"), this.turns.length > 0);
    this.onTimes(this.marks());
    this.#scroll();
  }

  #drawAnswer(turn) {
    const entry = this.entries.get(turn);
    if (!entry) return;
    const notes = [
      turn.until_s !== undefined && `seen up to ${clock(turn.until_s)}`, turn.stopped && "stopped",
    ].filter(Boolean).join(", ");
    const copy = make("button", { type: "button", class: "plain copy", "aria-label": "Copy the answer" }, "Copy");
    copy.addEventListener("click", async () => {
      const worked = await navigator.clipboard?.writeText(turn.answer).then(() => true, () => false);
      copy.textContent = worked ? "Copied" : "Not allowed";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    entry.replaceChildren(
      make("span", { class: "hidden" }, "Answer: "),
      turn.answer ? make("span", { class: "text" }, ...this.#linked(turn.answer)) : make("span", { class: "dots", "aria-label": "waiting" }, turn.stopped ? "…" : "● ● ●"),
      turn.answer ? copy : "", notes ? make("span", { class: "notes quiet small" }, notes) : "",
    );
    this.#scroll();
  }

  // A text in which the times that it names can be pressed.
  #linked(text) {
    const parts = [];
    let done = 0;
    for (const { at, length, seconds } of timesIn(text)) {
      parts.push(text.slice(done, at));
      parts.push(make("button", { type: "button", class: "time", onclick: () => this.onSeek(seconds) }, text.slice(at, at + length)));
      done = at + length;
    }
    return [...parts, text.slice(done)];
  }

  // The moments that the talk names: [{ seconds, latest }].
  marks() {
    const named = new Map();
    this.turns.forEach((turn, n) => {
      for (const { seconds } of timesIn(`${turn.question} ${turn.answer}`)) named.set(seconds, n === this.turns.length - 1);
    });
    return [...named].map(([seconds, latest]) => ({ seconds, latest }));
  }

  #scroll() { $("turns").scrollTop = $("turns").scrollHeight; }

  #fit() {
    const field = $("question");
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, 160)}px`;
  }

  #keep() {
    const said = this.turns.filter((turn) => turn.answer);
    try {
      if (said.length) localStorage.setItem(KEPT + this.id, JSON.stringify(said));
      else localStorage.removeItem(KEPT + this.id);
    } catch { /* no room, or not allowed: it lasts until the page is closed */ }
  }

  #forget() {
    this.stopping?.abort();
    this.turns = [];
    this.#keep();
    this.#draw();
    complain("question");
    $("question").focus();
  }

  #export() {
    const { name = "video" } = Object(this.subject());
    const text = this.turns.filter((turn) => turn.answer).map((turn) => `**${turn.question}**\n\n${turn.answer}\n`).join("\n");
    saveFile(`${name.replace(/[^\p{L}\p{N}]+/gu, "-")}-talk.md`, `# ${name}\n\n${text}`, "text/markdown");
  }
}

export const dropTalk = (id) => localStorage.removeItem(KEPT + id);

function read(id) {
  try {
    const turns = JSON.parse(localStorage.getItem(KEPT + id) ?? "[]");
    return turns.filter((turn) => typeof turn?.question === "string" && typeof turn?.answer === "string");
  } catch {
    return [];
  }
}
