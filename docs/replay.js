// <reactor-replay>: the recorded run of a server, step by step, or two runs side by side. Each recording is JSON in
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

const makeList = items => make("ol", "", ...items.map(([className, ...facts]) => make("li", className, ...facts)));

// What may change from step to step. It is new unless the step before has the same text for the same key.
const fact = (key, text, className = "fact") => {
    const element = make("span", className, text);
    element.dataset.fact = `${key}: ${text}`;
    return element;
};

const bytes = (key, text) => fact(key, text || "–", text ? "fact bytes" : "fact");

// How to draw the parts of a lane, by the first word of its key in the state; `all` is the lane as a whole.
const LANES = {
    client: { state: it => fact("", it), sent: it => bytes("", it), got: it => bytes("", it) },
    clients: {
        all: rows => makeTable(["who", "state", "sent", "got"], rows.map(it => [
            it.who, fact(it.who, it.state), bytes(`${it.who} sent`, it.sent), bytes(`${it.who} got`, it.got),
        ])),
    },
    kernel: {
        all: rows => makeTable(["fd", "who", "ready"], rows.map(({ fd, who, what }) =>
            [fact("fd", fd), fact(fd, who), what.map(it => fact(`${fd} ${who}`, it))])),
    },
    thread: {
        doing: it => fact("", it),
        table: rows => {
            const token = rows[0].slot === undefined ? [] : ["slot", "generation"];
            return makeTable(["fd", "who", "for", ...token], rows.map(it => [
                fact("fd", it.fd), fact(it.fd, it.who),
                it.for.split("|").map(name => fact(`${it.fd} for`, name, `fact ${name}`)),
                ...token.map(name => fact(`${it.fd} ${it.who} ${name}`, it[name])),
            ]));
        },
        batch: events => makeList(events.map(({ fd, who, flags, state }, index) =>
            [`is-${state}`, fact(`${index} is`, state), fact(index, `fd ${fd} ${who} ${flags}`)])),
        stack: frames => makeList(frames.map((name, depth) => ["", fact(depth, name)])),
        tasks: tasks => makeList(tasks.map(({ task, state }) =>
            [`is-${state}`, fact(task, state), fact("task", `task ${task}`)])),
    },
    buffers: {
        all: rows => makeTable(["who", "in", "out"], rows.map(it => [
            fact("who", it.who), bytes(`${it.who} in`, it.in),
            [bytes(`${it.who} out`, it.out), ...(it.note ? [fact(it.who, it.note)] : [])],
        ])),
    },
};

// The states of a run: at the start, and after each step of a path. So back is the same as forward. A step has what
// changes: a lane as a whole if it is a table, otherwise its parts.
const fold = (start, path) => {
    const states = [start];
    for (const step of path) {
        const state = { ...states.at(-1) };
        for (const [key, value] of Object.entries(step.set))
            state[key] = Array.isArray(value) ? value : { ...state[key], ...value };
        states.push(state);
    }
    return states;
};

// All paths through a recording, one for each way to choose.
const pathsOf = ({ steps, choices }) => {
    if (!steps?.length) throw new Error("a part of it has no steps");
    if (!choices?.length) return [steps];
    return choices.flatMap(choice => pathsOf(choice).map(rest => [...steps, ...rest]));
};

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
    parts = [];
    lines = new Map();
    sentence = make("p");

    constructor({ title, program, sources, start, at, ...rest }) {
        Object.assign(this, { title, start, at, rest });
        const paths = pathsOf(rest);
        this.source = make("div", "source", ...sources.map((piece, index) => this.drawSource(piece, index)));
        this.source.tabIndex = 0;
        for (const path of paths) {
            path.forEach(({ say, actor, at, beat, set }, index) => {
                const before = path[index - 1]?.beat ?? 0;
                if (!say || !actor || !set || !(beat >= before) || (at && !this.lines.has(`${at}`)))
                    throw new Error(`step ${index + 1} needs say, actor, set, a beat not past, a line that exists`);
            });
        }
        const states = paths.flatMap(path => fold(start, path));
        const lanes = make("div", "lanes");
        for (const key of Object.keys(Object.assign({}, ...states))) {
            const kind = key.split(" ")[0];
            if (!LANES[kind]) throw new Error(`there is no lane for "${key}"`);
            if (!lanes.lastChild?.classList.contains(kind)) lanes.append(make("div", `row ${kind}`));
            lanes.lastChild.append(this.drawLane(key, LANES[kind], states));
        }
        const threads = lanes.querySelectorAll(".thread > .lane").length;
        this.root = make("section", threads > 1 ? "run threads" : "run",
            make("p", "title", make("b", "", title), " ", make("code", "", program)), lanes, this.source);
        // The longest sentence takes the room for all of them.
        const longest = paths.flat().reduce((a, b) => (b.say.length > a.say.length ? b : a));
        this.says = make("div", "place", make("p", "ghost", ...this.say(longest)), this.sentence);
    }

    drawLane(key, draws, states) {
        const lane = make("section", "lane", make("h4", "", key));
        for (const [name, draw] of Object.entries(draws)) {
            const pick = state => (name === "all" ? state[key] : state[key]?.[name]);
            if (states.every(state => pick(state) === undefined)) continue;
            const place = new Place(draw);
            for (const state of states) place.view(pick(state));
            const label = { all: "", state: "", doing: "", table: "interest list" }[name] ?? name;
            lane.append(make("div", `part ${name}`, ...(label ? [make("h5", "", label)] : []), place.root));
            this.parts.push({ place, pick });
        }
        return lane;
    }

    drawSource({ file, name, first, lines }, piece) {
        const indent = Math.min(...lines.filter(line => line.trim()).map(line => line.search(/\S/)));
        const title = make("h4", "", name, " ", make("small", "", file));
        return make("section", "", title, ...lines.map((line, index) => {
            const [, space, code, comment = ""] = line.slice(indent).match(/^(\s*)(.*?)(\/\/.*)?$/);
            const text = make("code", "", code, make("i", "", comment));
            text.style.setProperty("--indent", `${space.length}ch`);
            const element = make("div", "line", make("span", "number", first + index), text);
            this.lines.set(`${piece},${first + index}`, element);
            return element;
        }));
    }

    // Follows these choices, each an index, to the next choice or the end.
    follow(chosen) {
        this.path = [];
        this.forks = [];
        for (let part = this.rest; part; part = part.choices?.[chosen[this.forks.length - 1]]) {
            this.path.push(...part.steps);
            if (part.choices?.length) this.forks.push({ step: this.path.length, choices: part.choices });
        }
        this.states = fold(this.start, this.path);
    }

    show(n, waits) {
        const step = this.path[n - 1];
        const [state, before] = [this.states[n], this.states[waits || n === 0 ? n : n - 1]];
        for (const { place, pick } of this.parts) place.show(pick(state), pick(before));
        this.sentence.replaceChildren(...this.say(step), make("i", "", waits ? " (paused)" : ""));
        // A step without a line leaves the server where it was.
        const { at } = this.path.slice(0, n).findLast(({ at }) => at) ?? this;
        const lit = this.lines.get(`${at}`);
        for (const line of this.lines.values())
            line.className = line !== lit ? "line" : step?.at && !waits ? "line lit" : "line lit past";
        if (!lit) return;
        // Scrolls the pane, never the page, and only if the line is not well inside.
        const pane = this.source.getBoundingClientRect();
        const top = lit.getBoundingClientRect().top - pane.top;
        if (top < pane.height * 0.15 || top > pane.height * 0.8) this.source.scrollTop += top - pane.height * 0.35;
    }

    say(step) {
        if (!step) return ["Nothing has happened yet. Press play, or take a step."];
        const { actor, say } = step;
        const kind = actor === "kernel" ? "kernel" : `thread ${actor}` in this.start ? "thread" : "client";
        // What stands between backquotes is code.
        const parts = say.split("`").map((text, index) => (index % 2 ? make("code", "", text) : text));
        return [make("span", `actor ${kind}`, actor), " ", ...parts];
    }
}

const KEYS = {
    "Space": "play, pause",
    "← →": "a step back, a step forward",
    "Home End": "to the start, to the end",
    "1 2 3": "choose what happens next",
    "?": "show or hide this",
};

class ReactorReplay extends HTMLElement {
    connectedCallback() {
        if (this.picture) return;
        this.picture = make("details", "", make("summary", "", "The run as a picture"));
        try {
            this.runs = [...this.querySelectorAll("script")].map(script => new Run(JSON.parse(script.textContent)));
            this.build();
        } catch (error) {
            const fault = `This replay is not shown, because its recording is malformed: ${error.message}`;
            console.warn(fault);
            this.prepend(make("p", "fault", fault));
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
        const end = make("span", "end", this.speed, this.rate, this.link, this.help);
        const bar = make("div", "bar", this.says, this.choices,
            make("div", "controls", this.back, this.toggle, this.forth, this.scrub, this.position, end));
        const runs = make("div", "runs", ...this.runs.map(run => run.root));
        this.follow([]);
        this.picture.hidden = !this.querySelector(":scope > :not(script)");
        this.picture.append(...this.childNodes);
        this.append(make("div", this.runs.length > 1 ? "replay pair" : "replay", runs, bar), this.picture);
        Object.assign(this, { tabIndex: 0, role: "group", ariaLabel: `Replay: ${this.runs[0].title}` });
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
        this.choices.replaceChildren(make("p", here ? "ghost" : "", note),
            make("div", here ? "" : "ghost", make("b", "", "What happens next?"), ...options));
    }

    // Shows the step that a reader asks for.
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
        // The last one, because the ID may be `choose` too.
        this.follow((wanted.getAll("choose").pop() ?? "").split(",").filter(Boolean).map(Number));
        this.show(parseInt(wanted.get("step"), 10) || 0);
        if (!first) this.scrollIntoView();
    }
}

const define = () => customElements.define("reactor-replay", ReactorReplay);
if (document.readyState === "loading") addEventListener("DOMContentLoaded", define);
else define();
})();
