// The time line: pictures of the video in order, each as wide as the stretch of time that it stands for; what a talk
// names is marked above it, where it is.

import { make } from "./dom.js";
import { clock } from "./times.js";

const COUNTS = [24, 12, 8, 6, 4, 3, 2, 1]; // of pictures side by side
const MIN_WIDTH = 58; // pixels of one

export class Timeline {
  // onSeek(seconds, number of the nearest picture)
  constructor(root, onSeek) {
    this.root = root;
    this.onSeek = onSeek;
    this.pins = make("div", { class: "pins", role: "group", "aria-label": "Moments that the talk names" });
    this.list = make("ol", { class: "stills", "aria-label": "Pictures of the video" });
    this.unseen = make("div", { class: "unseen" });
    this.head = make("div", { class: "playhead" });
    this.ticks = make("div", { class: "ticks", "aria-hidden": "true" });
    root.append(this.pins, make("div", { class: "strip" }, this.list, this.unseen, this.head), this.ticks);
    this.list.addEventListener("keydown", (event) => this.#walk(event));
    new ResizeObserver(() => this.#draw()).observe(root);
    this.clear();
  }

  clear() {
    this.shown = null;
    this.marks = [];
    this.seen(1);
    this.root.hidden = true;
  }

  // shown: start_s, end_s, width, height and times_s as the server tells them; urlOf(number) is a picture.
  set(shown, urlOf) {
    Object.assign(this, { shown, urlOf, drawn: 0 });
    this.root.hidden = false;
    this.#draw();
    this.at(shown.start_s);
  }

  get span() { return Math.max(1e-3, this.shown.end_s - this.shown.start_s); }
  #place(seconds) { return Math.min(1, Math.max(0, (seconds - this.shown.start_s) / this.span)); }

  // How much of it was watched, 0 to 1.
  seen(share) {
    this.unseen.style.setProperty("--from", share);
    this.unseen.hidden = share >= 1;
  }

  at(seconds) {
    if (this.shown) this.head.style.setProperty("--at", this.#place(seconds));
  }

  // marks: [{ seconds, latest }]
  mark(marks) {
    this.marks = marks;
    this.#drawMarks();
  }

  #draw() {
    if (!this.shown) return;
    const { times_s: times, width, height } = this.shown, room = this.root.clientWidth;
    const count = COUNTS.find((n) => n <= times.length && (room / n >= MIN_WIDTH || n === 1));
    const tall = Math.min(84, Math.max(36, (room / count) * (height / width)));
    this.root.style.setProperty("--tall", `${tall}px`);
    if (count === this.drawn) return;
    this.drawn = count;
    const long = this.shown.end_s >= 3600;
    // the nth of them stands at the beginning of its stretch
    this.numbers = Array.from({ length: count }, (_, n) => Math.floor((n * times.length) / count));
    this.list.replaceChildren(...this.numbers.map((number, n) => {
      const label = `Go to ${clock(times[number], long)}`;
      const picture = make("img", { src: this.urlOf(number), alt: "", draggable: "false" });
      const button = make("button", { type: "button", "aria-label": label, title: label, tabindex: n ? "-1" : "0" }, picture);
      button.addEventListener("click", (event) => this.#click(event, number));
      return make("li", {}, button);
    }));
    const tick = (seconds) => make("span", {}, clock(seconds, long));
    this.ticks.replaceChildren(...this.numbers.map((number) => tick(times[number])));
    this.#drawMarks();
  }

  #drawMarks() {
    if (!this.shown) return;
    const { start_s: start, end_s: end } = this.shown, long = end >= 3600;
    const inside = this.marks.filter(({ seconds }) => seconds >= start && seconds <= end);
    this.pins.replaceChildren(...inside.map(({ seconds, latest }) => {
      const said = clock(seconds, long);
      const pin = make("button", { type: "button", class: latest ? "pin latest" : "pin", title: `Go to ${said}`, "aria-label": `Go to ${said}, which the talk names` }, said);
      pin.style.setProperty("--at", this.#place(seconds));
      pin.addEventListener("click", () => this.onSeek(seconds, this.nearest(seconds)));
      return pin;
    }));
    const cells = new Set(inside.map(({ seconds }) => Math.min(this.drawn - 1, Math.floor(this.#place(seconds) * this.drawn))));
    [...this.list.children].forEach((cell, n) => cell.classList.toggle("named", cells.has(n)));
  }

  // The picture that shows a time: the last one that is not after it.
  nearest(seconds) {
    return Math.max(0, this.shown.times_s.findLastIndex((time) => time <= seconds + 1e-3));
  }

  // With the mouse exactly there, with the keyboard to the time of the picture.
  #click(event, number) {
    const box = this.list.getBoundingClientRect();
    const exact = this.shown.start_s + ((event.clientX - box.left) / box.width) * this.span;
    const seconds = event.detail ? exact : this.shown.times_s[number];
    this.onSeek(seconds, this.nearest(seconds));
  }

  #walk(event) {
    const buttons = [...this.list.querySelectorAll("button")], here = buttons.indexOf(document.activeElement);
    const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (there === undefined || !buttons[there]) return;
    event.preventDefault();
    buttons.forEach((button, n) => { button.tabIndex = n === there ? 0 : -1; });
    buttons[there].focus();
  }
}
