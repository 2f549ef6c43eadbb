// The editor of the Layout node: a widget whose value is the text of `boxes`, a JSON list of {name, x, y, width, height}, lowest first.
// It is a DOM widget like ComfyUI's own text area, so both renderers mount it, and saving, copying and the API export see a text.

import { app } from "../../scripts/app.js";

const GRID = 16; // pixels of the canvas
const REACH = 6; // pixels of the screen from which an edge attracts
const STEPS = 100; // that can be undone
const GOLDEN_ANGLE = 137.508; // degrees of hue between neighbours, as in models/layers/layout.py
const SIDES = ["x", "y", "width", "height"];
const LOST = "without an area or outside of the canvas";
const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const ON_NODES = ["ctrl+a", "ctrl+b", "ctrl+g", "ctrl+m", "alt+c", "p"]; // of ComfyUI's keys those that would change the nodes that are selected
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const STYLE = `
.tessera-layout { display: flex; flex-direction: column; gap: 4px; min-height: 280px; box-sizing: border-box; font: 12px sans-serif;
  color: var(--input-text, #ddd); }
.tessera-layout .bar { display: flex; gap: 2px; }
.tessera-layout :is(select, button, input) { font: inherit; color: inherit; background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #555); border-radius: 4px; height: 24px; padding: 0 6px; }
.tessera-layout select { flex: 1; min-width: 0; }
.tessera-layout button:disabled { opacity: 0.4; }
.tessera-layout .stage { flex: 1; min-height: 0; position: relative; overflow: hidden; display: grid; place-items: center;
  container-type: size; touch-action: none; user-select: none; cursor: crosshair; border-radius: 4px; background: var(--comfy-input-bg, #222); }
.tessera-layout :focus-visible { outline: 2px solid #4a9eff; outline-offset: -2px; }
.tessera-layout .canvas { position: relative; background: #fff2; outline: 1px solid var(--border-color, #888);
  width: min(100cqw - 16px, (100cqh - 16px) * var(--ratio)); aspect-ratio: var(--ratio); }
.tessera-layout .box { position: absolute; box-sizing: border-box; border: 1px solid var(--colour); cursor: move;
  background: color-mix(in srgb, var(--colour) 45%, transparent); }
.tessera-layout .frame { position: absolute; outline: 2px solid #fff; pointer-events: none; }
.tessera-layout .box.lost { border: 2px dashed #f44; }
.tessera-layout .box span { position: absolute; inset: 2px 4px; overflow: hidden; pointer-events: none; text-shadow: 0 0 3px #000; color: #fff; }
.tessera-layout .handle { position: absolute; pointer-events: auto; width: 9px; height: 9px; margin: -5px; background: #fff; border: 1px solid #000; box-sizing: border-box; }
.tessera-layout .name { position: absolute; min-width: 90px; z-index: 1; }
.tessera-layout .status { min-height: 15px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.tessera-layout .status.wrong { color: #f66; white-space: normal; }`;

function element(tag, properties = {}, ...children) {
    const { style, dataset, ...rest } = properties;
    const made = Object.assign(document.createElement(tag), rest);
    Object.entries(style ?? {}).forEach(([name, value]) => made.style.setProperty(name, value));
    Object.assign(made.dataset, dataset);
    made.append(...children);
    return made;
}

/** The boxes of a text. Throws where the server would refuse it, but for places and sizes, which the editor can show. */
function parse(text) {
    const boxes = JSON.parse(text);
    const named = (box) => typeof (box?.name ?? "") === "string";
    if (!Array.isArray(boxes) || !boxes.every((box) => named(box) && SIDES.every((side) => Number.isInteger(box?.[side]))))
        throw new Error("not a list of boxes with name, x, y, width and height in whole pixels");
    return boxes.map(({ name = "", x, y, width, height }) => ({ name, x, y, width, height }));
}

/** The editor that has the focus, unless a name is being typed. */
function focused() {
    const part = document.activeElement?.closest(".tessera-layout");
    return part && !document.activeElement.matches(".name") ? editors.get(part) : undefined;
}

/** How far to move so that one of `edges` comes to one of `lines`, or the first edge to the grid where no line is within `reach`. */
function pull(edges, lines, reach) {
    const ways = edges.flatMap((edge) => lines.map((line) => line - edge)).sort((a, b) => Math.abs(a) - Math.abs(b));
    return Math.abs(ways[0]) <= reach ? ways[0] : Math.round(edges[0] / GRID) * GRID - edges[0];
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const between = (a, b) => [Math.min(a, b), Math.abs(a - b)];

function handleAt(handle) {
    const share = (low, high) => (handle.includes(low) ? "0%" : handle.includes(high) ? "100%" : "50%");
    const style = { left: share("w", "e"), top: share("n", "s"), cursor: `${handle}-resize` };
    return element("div", { className: "handle", style, dataset: { handle } });
}

const editors = new WeakMap(); // of the elements
let made = 0;

class LayoutEditor {
    constructor(node, text) {
        this.node = node;
        this.selected = -1;
        const button = (label, sign, action) =>
            element("button", { type: "button", title: label, ariaLabel: label, textContent: sign, onclick: () => { this.stage.focus(); action(); } });
        this.list = element("select", { ariaLabel: "Selected box, uppermost first", onchange: () => this.select(Number(this.list.value)) });
        this.tools = {
            add: button("Add a box", "+", () => this.add()),
            duplicate: button("Duplicate (Ctrl+D)", "×2", () => this.paste([this.boxes[this.selected]])),
            rename: button("Rename (F2)", "✎", () => this.rename()),
            raise: button("Raise ( ] )", "▲", () => this.restack(1)),
            lower: button("Lower ( [ )", "▼", () => this.restack(-1)),
            remove: button("Delete (Del)", "✕", () => this.remove()),
            undo: button("Undo (Ctrl+Z)", "↶", () => this.step(this.past, this.future)),
            redo: button("Redo (Ctrl+Shift+Z)", "↷", () => this.step(this.future, this.past)),
        };
        this.layers = element("div", { style: { display: "contents" } });
        this.frame = element("div", { className: "frame" }, ...HANDLES.map(handleAt));
        this.canvas = element("div", { className: "canvas" }, this.layers, this.frame);
        this.stage = element("div", { className: "stage", tabIndex: 0, role: "listbox" }, this.canvas);
        for (const part of [this.list, this.stage]) // ComfyUI leaves undo to what has the focus and this type
            Object.defineProperty(part, "type", { value: "textarea" });
        this.status = element("div", { className: "status", role: "status" });
        this.element = element(
            "div",
            { className: "tessera-layout" },
            element("div", { className: "bar", role: "toolbar", ariaLabel: "Boxes" }, this.list, ...Object.values(this.tools)),
            this.stage,
            this.status,
        );
        editors.set(this.element, this);
        this.element.addEventListener("keydown", (event) => this.key(event));
        const on = { pointerdown: "press", pointermove: "drag", pointerup: "release", lostpointercapture: "cancel", dblclick: "name" };
        Object.entries(on).forEach(([type, method]) => this.stage.addEventListener(type, (event) => this[method](event)));
        this.element.addEventListener("pointerenter", () => this.gesture ?? this.render()); // a size may have come without a callback
        this.element.addEventListener("wheel", (event) => {
            event.preventDefault();
            event.stopPropagation();
            app.canvas.processMouseWheel(event); // zooms the graph, as over any other widget
        });
        this.load(text);
    }

    get size() {
        const side = (name) => Number(this.node.widgets?.find((widget) => widget.name === name)?.value) || 1024;
        return [side("width"), side("height")];
    }

    // ---- value and history

    /** A text from outside: a workflow, a paste, ComfyUI's own undo. */
    load(text) {
        if (text === this.text) return;
        this.past = [];
        this.future = [];
        this.show(text, this.selected);
    }

    show(text, selected) {
        this.text = text;
        this.wrong = "";
        try {
            this.boxes = parse(text);
        } catch (error) {
            this.boxes = [];
            this.wrong = `boxes cannot be shown: ${error.message}`;
        }
        this.select(selected);
    }

    /** A text from the editor; ComfyUI's change tracking is told. */
    write(text, selected) {
        app.canvas.emitBeforeChange();
        this.show(text, selected);
        this.widget.callback?.(text);
        app.canvas.emitAfterChange();
    }

    /** The boxes as they are now become a step that can be undone, or with `again` a part of the one before. */
    commit(again = false) {
        const text = JSON.stringify(this.boxes);
        if (text === this.text) return this.render();
        if (!again) this.past = [...this.past, [this.text, this.before]].slice(-STEPS);
        this.future = [];
        this.write(text, this.selected);
    }

    step(from, to) {
        if (!from.length) return;
        to.push([this.text, this.before]);
        this.write(...from.pop());
    }

    // ---- changes

    select(index) {
        this.selected = this.before = index < this.boxes.length ? index : -1; // before: the selection that undo comes back to
        this.render();
    }

    add() {
        const [width, height] = this.size;
        const [x, y] = [width, height].map((side) => Math.round(side / 4 / GRID) * GRID);
        this.boxes.push({ name: "", x, y, width: Math.ceil(width / 2), height: Math.ceil(height / 2) });
        this.selected = this.boxes.length - 1;
        this.commit();
    }

    /** Copies of boxes, uppermost, moved where they would hide what they are copies of. */
    paste(boxes) {
        for (const box of boxes) {
            const copy = { ...box };
            while (this.boxes.some((other) => SIDES.every((side) => other[side] === copy[side]))) {
                copy.x += GRID;
                copy.y += GRID;
            }
            this.fit(copy);
            this.boxes.push(copy);
        }
        this.selected = this.boxes.length - 1;
        this.commit();
    }

    remove() {
        if (this.selected < 0) return;
        this.boxes.splice(this.selected, 1);
        this.selected = -1;
        this.commit();
    }

    restack(step) {
        const to = this.selected + step;
        if (this.selected < 0 || to < 0 || to >= this.boxes.length) return;
        this.boxes.splice(to, 0, ...this.boxes.splice(this.selected, 1));
        this.selected = to;
        this.commit();
    }

    rename() {
        const box = this.boxes[this.selected];
        if (!box) return;
        const [width, height] = this.size;
        const style = { left: `${(100 * clamp(box.x, 0, width)) / width}%`, top: `${(100 * clamp(box.y, 0, height)) / height}%` };
        const input = element("input", { className: "name", value: box.name, maxLength: 255, ariaLabel: "Name of the box", style });
        const done = (keep) => {
            input.onblur = null; // taking it away blurs it
            input.remove();
            if (keep) box.name = input.value.trim();
            this.commit();
        };
        input.onblur = () => done(true);
        input.onkeydown = (event) => {
            event.stopPropagation();
            if (event.key !== "Enter" && event.key !== "Escape") return;
            done(event.key === "Enter");
            this.stage.focus();
        };
        this.canvas.append(input);
        input.focus();
        input.select();
    }

    /** Keep a pixel of the box on the canvas, and its sides at a pixel at least. */
    fit(box) {
        const [width, height] = this.size;
        box.width = Math.max(box.width, 1);
        box.height = Math.max(box.height, 1);
        box.x = clamp(box.x, 1 - box.width, width - 1);
        box.y = clamp(box.y, 1 - box.height, height - 1);
    }

    // ---- pointer

    /** Where the pointer is on the canvas, and how many of its pixels make one of the screen, whatever the zoom. */
    place(event) {
        const shown = this.canvas.getBoundingClientRect();
        const scale = this.size[0] / shown.width;
        return { at: [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale], scale };
    }

    /** Lines that attract, across and down: the edges of the canvas and of the boxes that are not being changed. */
    lines() {
        const others = this.boxes.filter((_, index) => index !== this.selected);
        const [width, height] = this.size;
        return [
            [0, width, ...others.flatMap((box) => [box.x, box.x + box.width])],
            [0, height, ...others.flatMap((box) => [box.y, box.y + box.height])],
        ];
    }

    snap(edges, axis, { scale, free }) {
        return free ? Math.round(edges[0]) - edges[0] : pull(edges, this.lines()[axis], REACH * scale);
    }

    press(event) {
        if (event.target.matches(".name")) return;
        event.stopPropagation();
        if (event.button === 1) return app.canvas.processMouseDown(event); // pans the graph
        if (event.button !== 0) return;
        this.stage.focus({ preventScroll: true });
        this.stage.setPointerCapture(event.pointerId);
        const { handle, index = -1 } = event.target.dataset;
        const kind = event.shiftKey ? "draw" : handle ? "resize" : index >= 0 ? "move" : "draw"; // with Shift a box is drawn over others
        if (kind !== "resize") this.select(kind === "move" ? Number(index) : -1);
        this.gesture = { kind, handle, start: this.place(event).at, from: { ...this.boxes[this.selected] }, client: [event.clientX, event.clientY] };
    }

    drag(event) {
        const drag = this.gesture;
        if (!drag) return event.buttons & 4 ? app.canvas.processMouseMove(event) : undefined;
        if (!drag.moved && Math.hypot(event.clientX - drag.client[0], event.clientY - drag.client[1]) < 3) return; // still a click
        const place = { ...this.place(event), free: event.altKey };
        if (drag.kind === "draw" && !drag.moved) {
            this.boxes.push({ name: "", x: 0, y: 0, width: 0, height: 0 });
            this.selected = this.boxes.length - 1;
            drag.start = this.corner(drag.start, place);
        }
        drag.moved = true;
        const box = this.boxes[this.selected];
        this[drag.kind](box, drag, place);
        if (drag.kind !== "draw") this.fit(box);
        this.render();
    }

    corner(at, place) {
        return at.map((value, axis) => clamp(value + this.snap([value], axis, place), 0, this.size[axis]));
    }

    draw(box, drag, place) {
        const end = this.corner(place.at, place);
        [box.x, box.width] = between(drag.start[0], end[0]);
        [box.y, box.height] = between(drag.start[1], end[1]);
    }

    move(box, { from, start }, place) {
        ["x", "y"].forEach((name, axis) => {
            const free = from[name] + place.at[axis] - start[axis];
            box[name] = Math.round(free + this.snap([free, free + from[SIDES[axis + 2]]], axis, place));
        });
    }

    resize(box, { from, start, handle }, place) {
        [["x", "width", "w", "e"], ["y", "height", "n", "s"]].forEach(([near, size, low, high], axis) => {
            const way = place.at[axis] - start[axis];
            const far = from[near] + from[size];
            const edge = (value) => Math.round(value + this.snap([value], axis, place));
            if (handle.includes(low)) {
                box[near] = Math.min(edge(from[near] + way), far - 1);
                box[size] = far - box[near];
            } else if (handle.includes(high)) box[size] = edge(far + way) - from[near];
        });
    }

    release(event) {
        if (event.button === 1) return app.canvas.processMouseUp(event);
        const drag = this.gesture;
        this.gesture = undefined;
        if (!drag?.moved) return;
        const box = this.boxes[this.selected];
        if (drag.kind === "draw" && Math.min(box.width, box.height) < 1) this.remove(); // an area is nothing to guess
        else this.commit();
    }

    /** The pointer was taken away in the middle of a drag: as if it had not begun. */
    cancel() {
        if (!this.gesture) return;
        this.gesture = undefined;
        this.show(this.text, this.before);
    }

    name(event) {
        if (!event.target.matches(".name")) this.rename();
    }

    // ---- keyboard

    key(event) {
        const box = this.boxes[this.selected];
        const command = event.ctrlKey || event.metaKey;
        const letter = command && event.key.toLowerCase();
        const onStage = document.activeElement === this.stage; // the list and the buttons have arrows and Enter of their own
        const named = `${command ? "ctrl+" : ""}${event.altKey ? "alt+" : ""}${event.key.toLowerCase()}`;
        if (["c", "x", "v"].includes(letter)) return event.stopPropagation(); // the browser makes it an event of the clipboard
        if (letter === "d") {
            if (box) this.paste([box]);
        } else if (ON_NODES.includes(named)) {
            // Nothing: a key that is missed here must not bypass, mute or pin a node.
        } else if (letter === "z" || letter === "y") {
            this.cancel();
            if (letter === "y" || event.shiftKey) this.step(this.future, this.past);
            else this.step(this.past, this.future);
        } else if (box && onStage && ARROWS[event.key]) {
            const step = event.shiftKey ? GRID : 1;
            const [x, y] = command ? ["width", "height"] : ["x", "y"];
            box[x] += step * ARROWS[event.key][0];
            box[y] += step * ARROWS[event.key][1];
            this.fit(box);
            this.commit(event.repeat && this.past.length > 0);
        } else if (event.key === "Delete" || event.key === "Backspace") this.remove();
        else if (event.key === "[" || event.key === "]") this.restack(event.key === "]" ? 1 : -1);
        else if (event.key === "F2" || (onStage && event.key === "Enter" && !command)) this.rename();
        else if (event.key === "Escape" && this.gesture) this.cancel();
        else if (event.key === "Escape" && box) this.select(-1);
        else return;
        event.preventDefault();
        event.stopPropagation();
    }

    // ---- display

    render() {
        const { boxes, selected, tools } = this;
        const [width, height] = this.size;
        const named = (index) => boxes[index].name || `Layer ${index + 1}`;
        const outside = (box) => box.x >= width || box.y >= height || box.x + box.width <= 0 || box.y + box.height <= 0;
        const lost = (box) => outside(box) || Math.min(box.width, box.height) < 1; // what the server refuses
        const spot = (box) => `${box.x}, ${box.y}, ${box.width} × ${box.height}`;
        this.canvas.style.setProperty("--ratio", width / height);
        this.stage.ariaLabel = `Canvas of ${width} × ${height} pixels. Drag to draw a box; arrow keys move the selected one, with Ctrl its size.`;
        const lay = (shown, box) => {
            const shares = { left: box.x / width, top: box.y / height, width: box.width / width, height: box.height / height };
            Object.entries(shares).forEach(([name, share]) => (shown.style[name] = `${100 * share}%`));
        };
        while (this.layers.children.length > boxes.length) this.layers.lastChild.remove();
        while (this.layers.children.length < boxes.length) { // the others stay: one that goes away takes its double click along
            const index = this.layers.children.length;
            const shown = element("div", { className: "box", role: "option", dataset: { index } }, element("span"));
            shown.style.setProperty("--colour", `hsl(${(index * GOLDEN_ANGLE) % 360} 60% 60%)`);
            this.layers.append(shown);
        }
        boxes.forEach((box, index) => {
            const shown = this.layers.children[index];
            lay(shown, box);
            shown.classList.toggle("lost", lost(box));
            shown.firstChild.textContent = named(index);
            shown.ariaLabel = `${named(index)}: ${spot(box)}${lost(box) ? `, ${LOST}` : ""}`;
            shown.ariaSelected = index === selected;
        });
        this.frame.hidden = selected < 0;
        if (selected >= 0) lay(this.frame, boxes[selected]);
        this.list.replaceChildren(
            element("option", { value: -1, textContent: `${boxes.length} box${boxes.length === 1 ? "" : "es"}` }),
            ...boxes.map((_, index) => element("option", { value: index, textContent: `${index + 1}  ${named(index)}` })).reverse(),
        );
        this.list.value = selected;
        const box = boxes[selected];
        tools.duplicate.disabled = tools.rename.disabled = tools.remove.disabled = !box;
        tools.raise.disabled = !box || selected === boxes.length - 1;
        tools.lower.disabled = !box || selected === 0;
        tools.undo.disabled = !this.past.length;
        tools.redo.disabled = !this.future.length;
        const count = boxes.filter(lost).length;
        this.status.classList.toggle("wrong", Boolean(this.wrong || count));
        this.status.textContent = this.wrong || (count && `${count} ${LOST} (red): move, resize or delete`)
            || (box ? spot(box) : "Drag to draw, double-click to name. Alt: no snapping.");
    }
}

function layoutWidget(node, name, [, options]) {
    const editor = new LayoutEditor(node, options.default);
    // Nodes 2.0 keeps the element that it shows for a widget of this id, name and type, though undo has made the node anew: each has its own type.
    const widget = node.addDOMWidget(name, `TESSERA_LAYOUT ${++made}`, editor.element, {
        getValue: () => editor.text,
        setValue: (text) => editor.load(String(text)),
        getMinHeight: () => 300,
        hideOnZoom: false,
    });
    editor.widget = widget;
    for (const side of node.widgets.filter((other) => ["width", "height"].includes(other.name))) {
        const before = side.callback;
        side.callback = function (...given) {
            before?.apply(this, given);
            editor.render();
        };
    }
    const configured = node.onConfigure;
    node.onConfigure = function (...given) {
        configured?.apply(this, given);
        editor.render();
    };
    return { widget, minWidth: 340, minHeight: 480 };
}

// On the window, before ComfyUI, which would copy and paste the nodes that are selected. A box is the text of a list with it: `boxes` of another node.
for (const type of ["copy", "cut", "paste"]) {
    const act = (event) => {
        const editor = focused();
        if (!editor) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        const box = editor.boxes[editor.selected];
        if (type !== "paste") {
            if (box) event.clipboardData.setData("text/plain", JSON.stringify([box]));
            if (type === "cut") editor.remove();
            return;
        }
        try {
            editor.paste(parse(event.clipboardData.getData("text/plain")));
        } catch {
            editor.status.textContent = "No boxes on the clipboard: copy one with Ctrl+C";
        }
    };
    window.addEventListener(type, act, true);
}

document.head.append(element("style", { textContent: STYLE }));
app.registerExtension({
    name: "Tessera.Layout",
    getCustomWidgets: () => ({ TESSERA_LAYOUT: layoutWidget }),
});
