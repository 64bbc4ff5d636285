// <reactor-replay>: the recorded run of a server, step by step; or two runs, side by side. Each recording is JSON in
// a <script> inside the element. What else is inside, a picture, is all that there is without JavaScript.
(() => {

const make = (tag, className = "", ...children) => {
    const element = document.createElement(tag);
    element.className = className;
    element.append(...children);
    return element;
};

const makeButton = (label, action, ...children) => {
    const button = make("button", "", ...children);
    Object.assign(button, { type: "button", title: label, ariaLabel: label, onclick: action });
    return button;
};

const makeRange = (label, min, max, step, action) => {
    const range = make("input");
    return Object.assign(range, { type: "range", min, max, step, value: 0, ariaLabel: label, oninput: action });
};

const makeTable = (titles, rows) => {
    const head = titles.map(title => make("th", title, title));
    const body = rows.map(cells =>
        make("tr", "", ...cells.map((cell, column) => make("td", titles[column], ...[cell].flat()))));
    return make("table", "", make("thead", "", make("tr", "", ...head)), make("tbody", "", ...body));
};

// Something that may change from step to step: it is new unless the step before has the same text for the same key.
const fact = (key, text, className = "") => {
    const element = make("span", `fact ${className}`, text);
    element.dataset.fact = `${key}: ${text}`;
    return element;
};

const bytes = (key, text) => fact(key, text || "–", text && "bytes");

// How to draw the parts of a lane, by the first word of its key in the state; `all` is the lane as a whole.
const LANES = {
    client: {
        state: it => fact("", it),
        sent: it => bytes("", it),
        got: it => bytes("", it),
    },
    kernel: {
        all: rows => makeTable(["fd", "who", "ready"], rows.map(it =>
            [fact("fd", it.fd), fact(it.fd, it.who), it.what.map(what => fact(`${it.fd} ${it.who}`, what))])),
    },
    thread: {
        doing: it => fact("", it),
        table: rows => makeTable(["fd", "who", "for", "slot", "generation"], rows.map(it =>
            [fact("fd", it.fd), fact(it.fd, it.who), it.for.split("|").map(name => fact(`${it.fd} for`, name, name)),
                ...[it.slot, it.generation].map(number => fact(`${it.fd} ${it.who} token`, number ?? ""))])),
        batch: events => make("ol", "", ...events.map((it, index) => make("li", `is-${it.state}`,
            fact(`${index} is`, it.state), fact(index, `fd ${it.fd} ${it.who} ${it.flags}`)))),
        stack: frames => make("ol", "", ...frames.map((name, depth) => make("li", "", fact(depth, name)))),
        tasks: tasks => make("ol", "", ...tasks.map(it => make("li", `is-${it.state}`,
            fact(it.task, it.state), fact("task", `task ${it.task}`)))),
    },
    buffers: {
        all: rows => makeTable(["who", "in", "out"], rows.map(it => [fact("who", it.who), bytes(`${it.who} in`, it.in),
            [bytes(`${it.who} out`, it.out), ...(it.note ? [fact(it.who, it.note)] : [])]])),
    },
};
const LABELS = { sent: "sent", got: "got", table: "table of interest", batch: "batch", stack: "stack", tasks: "tasks" };

// The states of a run: at the start, and after each step of a path. So back is the same as forward.
const fold = (start, path) => {
    const states = [start];
    for (const step of path) states.push({ ...states.at(-1), ...step.set });
    return states;
};

// All paths through a recording, one for each way to choose.
const pathsOf = ({ steps, choices = [] }) => (choices.length === 0 ? [steps]
    : choices.flatMap(choice => pathsOf(choice).map(rest => [...steps, ...rest])));

// For each moment, at which step each run is. In each beat, the run with fewer steps waits at its last one.
const align = paths => {
    const moments = [paths.map(() => 0)];
    for (const beat of new Set(paths.flat().map(step => step.beat).sort((a, b) => a - b))) {
        const before = moments.at(-1);
        const counts = paths.map(path => path.filter(step => step.beat === beat).length);
        for (let n = 1; n <= Math.max(...counts); n += 1)
            moments.push(before.map((step, run) => step + Math.min(n, counts[run])));
    }
    return moments;
};

// Everything that one part of a lane ever shows. All of it lies in one cell of a grid, and one view is visible: so
// the place is as large as the largest of them, and nothing moves from step to step.
class Place {
    root = make("div", "place");
    views = new Map();

    constructor(draw) {
        this.draw = draw;
    }

    view(value) {
        const key = JSON.stringify(value) ?? "";
        if (!this.views.has(key)) {
            this.views.set(key, make("div", "view", key && (value.length === 0 ? "–" : this.draw(value))));
            this.root.append(this.views.get(key));
        }
        return this.views.get(key);
    }

    show(value, before) {
        const [now, old] = [this.view(value), this.view(before)];
        const known = new Set([...old.querySelectorAll(".fact")].map(it => it.dataset.fact));
        for (const view of this.views.values()) view.classList.toggle("shown", view === now);
        for (const it of this.root.querySelectorAll(".fact"))
            it.classList.toggle("new", now.contains(it) && !known.has(it.dataset.fact));
    }
}

class Run {
    constructor(recording) {
        this.recording = recording;
        this.parts = [];
        const paths = pathsOf(recording);
        for (const path of paths) this.validate(path);
        const states = paths.flatMap(path => fold(recording.start, path));
        const lanes = make("div", "lanes");
        for (const key of Object.keys(Object.assign({}, ...states))) {
            const kind = key.split(" ")[0];
            if (!LANES[kind]) throw new Error(`no lane is called "${key}"`);
            if (!lanes.lastChild?.classList.contains(kind)) lanes.append(make("div", `row ${kind}`));
            const lane = make("section", "lane", make("h4", "", key));
            lanes.lastChild.append(lane);
            for (const [name, draw] of Object.entries(LANES[kind])) {
                const pick = state => (name === "all" ? state[key] : state[key]?.[name]);
                if (states.every(state => pick(state) === undefined)) continue;
                const place = new Place(draw);
                for (const state of states) place.view(pick(state));
                lane.append(make("div", `part ${name}`, LABELS[name] ? make("h5", "", LABELS[name]) : "", place.root));
                this.parts.push({ place, pick });
            }
        }
        const title = make("p", "title", make("b", "", recording.title), " ", make("code", "", recording.program));
        this.source = make("div", "source", ...recording.sources.map(piece => this.drawSource(piece)));
        this.source.tabIndex = 0;
        this.root = make("section", lanes.querySelectorAll(".thread > .lane").length > 1 ? "run threads" : "run",
            title, lanes, this.source);
        // The longest sentence reserves the room for all of them.
        const longest = paths.flat().reduce((a, b) => (b.say.length > a.say.length ? b : a));
        this.sentence = make("p");
        this.says = make("div", "place", make("p", "ghost", ...this.say(longest)), this.sentence);
    }

    validate(path) {
        path.forEach(({ say, actor, at, beat, set }, index) => {
            const [piece, line] = at ?? [];
            if (!say || !actor || !set) throw new Error(`step ${index + 1} needs "say", "actor" and "set"`);
            if (!(beat >= (path[index - 1]?.beat ?? 0))) throw new Error(`step ${index + 1} has no beat, or a past one`);
            if (at && this.lineOf(piece, line, this.recording.sources[piece]?.lines) === undefined)
                throw new Error(`step ${index + 1} is at a line that is not there`);
        });
    }

    lineOf(piece, line, lines) {
        return lines?.[line - this.recording.sources[piece].first];
    }

    drawSource({ file, name, first, lines }) {
        const indent = Math.min(...lines.filter(line => line.trim()).map(line => line.search(/\S/)));
        return make("section", "", make("h4", "", name, " ", make("small", "", file)), ...lines.map((line, index) => {
            const [, space, code, comment = ""] = line.slice(indent).match(/^(\s*)(.*?)(\/\/.*)?$/);
            const text = make("code", "", code, make("i", "", comment));
            text.style.setProperty("--indent", `${space.length}ch`);
            return make("div", "line", make("span", "number", first + index), text);
        }));
    }

    // Takes the path of these choices, each an index, to its next choice or its end.
    follow(chosen) {
        this.path = [];
        this.forks = [];
        for (let part = this.recording; part; part = part.choices?.[chosen[this.forks.length - 1]]) {
            this.path.push(...part.steps);
            if (part.choices) this.forks.push({ step: this.path.length, choices: part.choices });
        }
        this.states = fold(this.recording.start, this.path);
    }

    show(n, waits) {
        for (const { place, pick } of this.parts)
            place.show(pick(this.states[n]), pick(this.states[Math.max(n - 1, 0)]));
        this.sentence.replaceChildren(...this.say(this.path[n - 1]), waits ? make("i", "", " (It waits.)") : "");
        const [piece, line] = this.path.slice(0, n).findLast(step => step.at)?.at ?? [];
        const lines = this.source.children[piece]?.querySelectorAll(".line");
        const lit = this.lineOf(piece, line, lines);
        for (const it of this.source.querySelectorAll(".lit")) it.classList.remove("lit", "past");
        lit?.classList.add("lit", ...(this.path[n - 1].at ? [] : ["past"]));
        // Scrolls the pane, never the page, and only if the line is not well inside.
        const pane = this.source.getBoundingClientRect();
        const top = lit ? lit.getBoundingClientRect().top - pane.top : pane.height / 2;
        if (top < pane.height * 0.15 || top > pane.height * 0.8) this.source.scrollTop += top - pane.height * 0.35;
    }

    say(step) {
        if (!step) return ["Nothing has happened yet. Press play, or take a step."];
        const kind = step.actor === "kernel" ? "kernel" : `thread ${step.actor}` in this.recording.start ? "thread" : "client";
        // What stands between backquotes is code.
        const parts = step.say.split("`").map((text, index) => (index % 2 ? make("code", "", text) : text));
        return [make("span", `actor ${kind}`, step.actor), " ", ...parts];
    }
}

const KEYS = { "Space": "play, pause", "← →": "a step back, a step forward", "Home End": "to the start, to the end",
    "1 2 3": "choose what happens next", "?": "show or hide this" };

class ReactorReplay extends HTMLElement {
    connectedCallback() {
        if (this.picture) return;
        this.picture = make("details", "", make("summary", "", "The run as a picture"));
        try {
            const scripts = [...this.querySelectorAll("script")];
            this.runs = scripts.map(script => new Run(JSON.parse(script.textContent)));
            this.build();
        } catch (error) {
            this.prepend(make("p", "fault", `This replay is not shown, because its recording is malformed: ${error.message}`));
            console.warn(this.firstChild.textContent);
        }
    }

    build() {
        this.back = makeButton("step back", () => this.go(this.n - 1), make("span", "icon back"));
        this.toggle = makeButton("play", () => this.play(!this.timer), make("span", "icon play"));
        this.forth = makeButton("step forward", () => this.go(this.n + 1), make("span", "icon forth"));
        this.scrub = makeRange("step", 0, 0, 1, () => this.go(Number(this.scrub.value)));
        this.position = make("span", "position");
        // The exponent of ten: from 0.2 to 20 steps a second.
        this.speed = makeRange("speed", -0.7, 1.3, 0.1, () => this.play(this.timer));
        this.rate = make("span", "rate");
        this.link = makeButton("copy the link to this step", () => this.copy(), "link");
        const keys = Object.entries(KEYS).flatMap(([names, what]) =>
            [make("dt", "", ...names.split(" ").map(name => make("kbd", "", name))), make("dd", "", what)]);
        this.help = make("details", "help", make("summary", "", "?"), make("dl", "", ...keys));
        this.help.firstChild.title = this.help.firstChild.ariaLabel = "keys";
        this.says = make("div", "says", ...this.runs.map(run => run.says));
        this.choices = make("div", "choices place");
        const bar = make("div", "bar", this.says, this.choices, make("div", "controls", this.back, this.toggle, this.forth,
            this.scrub, this.position, make("span", "end", this.speed, this.rate, this.link, this.help)));
        const pair = this.runs.length > 1 ? " pair" : "";
        this.follow([]);
        this.picture.append(...this.childNodes);
        this.append(make("div", `replay${pair}`, make("div", "runs", ...this.runs.map(run => run.root)), bar), this.picture);
        Object.assign(this, { tabIndex: 0, role: "group", ariaLabel: `Replay: ${this.runs[0].recording.title}` });
        this.play(false);
        this.show(0);
        this.open();
        this.addEventListener("keydown", event => this.press(event));
        // A click on a button leaves the focus on the element, so that the space bar still plays and pauses.
        bar.addEventListener("mousedown", event => {
            if (!event.target.closest("button")) return;
            event.preventDefault();
            this.focus({ preventScroll: true });
        });
        addEventListener("hashchange", () => this.open());
        addEventListener("beforeprint", () => { this.picture.open = true; });
    }

    follow(chosen) {
        for (const run of this.runs) run.follow(chosen);
        this.moments = align(this.runs.map(run => run.path));
        // Of two runs, the first one has the choices, and both follow them.
        this.forks = this.runs[0].forks.map(({ step, choices }) =>
            ({ choices, moment: this.moments.findLastIndex(steps => steps[0] === step) }));
        this.chosen = chosen.filter((choice, depth) => this.forks[depth]?.choices[choice]);
    }

    show(n) {
        const last = this.moments.length - 1;
        this.n = Math.min(Math.max(n, 0), last);
        const [now, before] = [this.moments[this.n], this.moments[this.n - 1]];
        const focused = this.contains(document.activeElement);
        this.says.ariaLive = this.timer && this.speed.value > 0 ? "off" : "polite";
        this.runs.forEach((run, index) => run.show(now[index], now[index] === before?.[index]));
        Object.assign(this.scrub, { max: last, value: this.n, ariaValueText: `step ${this.n} of ${last}` });
        this.position.textContent = this.scrub.ariaValueText;
        this.back.ariaDisabled = this.n === 0;
        this.forth.ariaDisabled = this.n === last;
        this.showChoices();
        if (focused && !this.contains(document.activeElement)) this.focus({ preventScroll: true });
    }

    // The choices, at their step; before and after it, a note in the same place.
    showChoices() {
        const ahead = this.forks.findIndex(fork => fork.moment >= this.n);
        const depth = ahead < 0 ? this.forks.length - 1 : ahead;
        if (depth < 0) return;
        const { choices, moment } = this.forks[depth];
        const options = choices.map(({ label }, index) => {
            const choose = () => {
                this.follow([...this.chosen.slice(0, depth), index]);
                this.go(moment + 1);
            };
            const option = makeButton(label, choose, make("kbd", "", index + 1), " ", label);
            option.ariaPressed = index === this.chosen[depth];
            return option;
        });
        const here = this.n === moment;
        const note = this.n < moment ? `What happens after step ${moment} is up to you.`
            : `Your choice after step ${moment}: ${choices[this.chosen[depth]]?.label}`;
        this.choices.replaceChildren(make("div", here ? "" : "ghost", make("b", "", "What happens next?"), ...options),
            make("p", here ? "ghost" : "", note));
    }

    // Shows a step that a reader asks for.
    go(n) {
        this.play(false);
        this.show(n);
    }

    play(on) {
        clearTimeout(this.timer);
        clearTimeout(this.stopped);
        if (on && !this.timer && this.n === this.moments.length - 1) this.show(0);
        const speed = 10 ** this.speed.value;
        this.timer = on && setTimeout(() => {
            this.show(this.n + 1);
            this.play(this.n < this.moments.length - 1);
        }, 1000 / speed);
        // A key that is held down stops once.
        if (!on && this.n !== undefined) this.stopped = setTimeout(() => this.setAddress(), 300);
        this.rate.textContent = `${speed.toFixed(speed < 5 ? 1 : 0)} steps/s`;
        this.speed.ariaValueText = this.rate.textContent;
        this.toggle.title = this.toggle.ariaLabel = on ? "pause" : "play";
        this.toggle.firstChild.className = `icon ${this.toggle.title}`;
    }

    press(event) {
        const { key, target } = event;
        if (event.altKey || event.ctrlKey || event.metaKey) return;
        // Otherwise mdBook would turn the page, search, or show its own help.
        event.stopPropagation();
        const option = this.choices.querySelectorAll("div:not(.ghost) > button")[key - 1];
        const action = option ? () => option.click() : {
            " ": () => this.play(!this.timer),
            "ArrowLeft": () => this.go(this.n - 1),
            "ArrowRight": () => this.go(this.n + 1),
            "Home": () => this.go(0),
            "End": () => this.go(this.moments.length - 1),
            "Escape": () => { this.help.open = false; },
            "?": () => { this.help.open = !this.help.open; },
        }[key];
        // A button in focus has the space bar for itself, and the speed has the arrows.
        const taken = target === this.speed ? key.length > 1 : key === " " && target.matches("button, summary");
        if (!action || taken) return;
        event.preventDefault();
        action();
    }

    address() {
        const parts = [this.id, `step=${this.n}`, this.chosen.length > 0 && `choose=${this.chosen}`];
        return `${location.href.split("#")[0]}#${parts.filter(Boolean).join("&")}`;
    }

    setAddress() {
        try {
            history.replaceState(history.state, "", this.address());
        } catch { /* Some browsers don't allow that in a file. */ }
    }

    async copy() {
        this.setAddress();
        const copied = navigator.clipboard?.writeText(this.address());
        this.link.textContent = await copied?.then(() => "copied", () => undefined) ?? "see the address";
        setTimeout(() => { this.link.textContent = "link"; }, 2000);
    }

    // `#step=17` opens the first replay of a page at a step, and `#ID&step=17` any; `&choose=1,0` makes choices.
    open() {
        const wanted = new URLSearchParams(location.hash.slice(1));
        const [name] = wanted.keys();
        const first = name === "step" && document.querySelector("reactor-replay") === this;
        if (!wanted.has("step") || (name !== this.id && !first)) return;
        this.play(false);
        this.follow((wanted.get("choose") ?? "").split(",").filter(Boolean).map(Number));
        this.show(parseInt(wanted.get("step"), 10) || 0);
        if (!first) this.scrollIntoView();
    }
}

const define = () => customElements.define("reactor-replay", ReactorReplay);
if (document.readyState === "loading") addEventListener("DOMContentLoaded", define);
else define();
})();
