// What a run left, on its node: the line that says what was done, and links to the files that were saved.
// ComfyUI draws the line only while the node runs and forgets it when undo, another tab or a subgraph makes the node anew.

import { app } from "../../scripts/app.js";

const NAME = "$$node-text-preview"; // of ComfyUI's widget for a running node's line: where ours is in its place, it writes into that
const ROW = 16; // pixels of a row of text
const LINK = 26; // pixels
const ROWS = 12; // of text that are seen without scrolling
const MARGIN = 4; // pixels that the canvas leaves around the widget
const FONT = "12px sans-serif";

const STYLE = `
.tessera-result { display: flex; flex-direction: column; padding: 0 6px; box-sizing: border-box; font: ${FONT}; color: var(--input-text, #ddd); }
.tessera-result p { flex: 0 0 auto; max-height: ${ROWS * ROW}px; margin: 0; line-height: ${ROW}px; overflow-y: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; }
.tessera-result :is(a, span) { flex: 0 0 ${LINK - 4}px; margin: 2px 0; padding: 0 8px; line-height: ${LINK - 6}px; box-sizing: border-box;
  color: inherit; text-align: center; text-decoration: none; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.tessera-result a { background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); border-radius: 4px; }
.tessera-result a:hover { text-decoration: underline; }
.tessera-result :focus-visible { outline: 2px solid #4a9eff; outline-offset: -2px; }`;

const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
const pen = document.createElement("canvas").getContext("2d");
let made = 0;

function link({ filename, subfolder, type }) {
    const place = [type, subfolder, filename].filter(Boolean).join("/");
    if (filename.endsWith("_")) // a folder: its name is the number's, without an ending
        return element("span", { textContent: `Folder ${place}`, title: place });
    const href = app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    return element("a", { href, download: filename, textContent: `Download ${filename}`, title: place, draggable: false });
}

/** The rows that a text takes in so many pixels; words that do not fit leave a tenth of a row empty. */
function rows(text, width) {
    pen.font = FONT;
    const wrapped = (line) => Math.max(Math.ceil(pen.measureText(line).width / (0.9 * width)), 1);
    return text ? Math.min(text.split("\n").reduce((sum, line) => sum + wrapped(line), 0), ROWS) : 0;
}

/** The widget of a node, instead of ComfyUI's, which takes what is said for Markdown and holds no links. */
function resultWidget(node) {
    const live = node.widgets?.find((other) => other.name === NAME);
    if (live?.files) return live;
    if (live) {
        live.onRemove?.();
        node.removeWidget(live);
    }
    const text = element("p", { role: "status" });
    const files = element("div", { role: "group", ariaLabel: "Saved files", style: "display: contents" });
    const result = element("div", { className: "tessera-result" });
    result.append(text, files);
    result.addEventListener("pointerdown", (event) => event.stopPropagation()); // is no drag of the node
    const height = () => ROW * rows(text.textContent, node.size[0] - 4 * MARGIN - 12) + LINK * files.children.length + 2 * MARGIN;
    // Nodes 2.0 keeps the element that it shows for a widget of this id, name and type, though undo has made the node anew: each has its own type.
    const widget = node.addDOMWidget(NAME, `TESSERA_RESULT ${++made}`, result, {
        getValue: () => text.textContent,
        setValue: (value) => (text.textContent = value),
        serialize: false,
        hideOnZoom: false,
        margin: MARGIN,
        getMinHeight: height,
        getMaxHeight: height,
    });
    widget.serialize = false; // the option is about the API export, this about the saved workflow
    return Object.assign(widget, { files });
}

/** What a node's output says, on the node, instead of what the run before said. */
function show(node, { text, tessera_files: files }) {
    if (!text && !files) return;
    const widget = resultWidget(node);
    if (text) widget.value = text.join("\n");
    if (files) widget.files.replaceChildren(...files.map(link));
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    node.setDirtyCanvas(true, true);
}

const ours = (node) => node?.constructor.nodeData?.name.startsWith("Tessera");

/** The node of a key of ComfyUI's outputs: its id, behind that of the subgraph where it lies in one. */
function nodeOf(key) {
    const [id, subgraph] = key.split(":").reverse();
    const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
    return graph?.getNodeById(id);
}

/** What a running node says; `nodeId` is behind those of the subgraph nodes around it. Kept with the outputs, as a patch has no output of its own. */
function hear({ detail: { nodeId, text } }) {
    const ids = String(nodeId).split(":");
    const id = ids.pop();
    const graph = ids.reduce((around, outer) => around?.getNodeById(outer)?.subgraph, app.rootGraph);
    const node = graph?.getNodeById(id);
    if (!ours(node)) return;
    const key = ids.length ? `${graph.id}:${id}` : id;
    app.nodeOutputs[key] = { ...app.nodeOutputs[key], text: [text] };
    show(node, { text: [text] });
}

document.head.append(element("style", { textContent: STYLE }));
app.registerExtension({
    name: "Tessera.Results",
    setup() {
        app.api.addEventListener("progress_text", hear);
    },
    beforeRegisterNodeDef(type, { name }) {
        if (!name.startsWith("Tessera")) return;
        const executed = type.prototype.onExecuted;
        type.prototype.onExecuted = function (output) {
            executed?.call(this, output);
            show(this, output ?? {}); // a node that ran before, and had nothing to show
        };
    },
    onNodeOutputsUpdated(outputs) { // undo, another tab, or a run of the history
        for (const [key, output] of Object.entries(outputs)) {
            const node = output && nodeOf(key);
            if (ours(node)) show(node, output);
        }
    },
});
