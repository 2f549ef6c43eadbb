// Links to the files that a node has saved, on the node: one for each entry of `tessera_files` in its output.

import { app } from "../../scripts/app.js";

const NAME = "tessera_files";
const LINE = 26; // pixels
const MARGIN = 4; // pixels that the canvas leaves around the widget

const STYLE = `
.tessera-files { display: flex; flex-direction: column; padding: 0 6px; box-sizing: border-box; font: 12px sans-serif; color: var(--input-text, #ddd); }
.tessera-files > * { flex: 0 0 ${LINE - 4}px; margin: 2px 0; padding: 0 8px; line-height: ${LINE - 6}px; box-sizing: border-box; color: inherit;
  text-align: center; text-decoration: none; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.tessera-files a { background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555); border-radius: 4px; }
.tessera-files a:hover { text-decoration: underline; }
.tessera-files :focus-visible { outline: 2px solid #4a9eff; outline-offset: -2px; }`;

function line({ filename, subfolder, type }) {
    const place = [type, subfolder, filename].filter(Boolean).join("/");
    if (filename.endsWith("_")) // a folder: its name is the number's, without an ending
        return Object.assign(document.createElement("span"), { textContent: `Folder ${place}`, title: place });
    const href = app.api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    const link = { href, download: filename, textContent: `Download ${filename}`, title: place, draggable: false };
    return Object.assign(document.createElement("a"), link);
}

/** The files of a node's output on the node, instead of those of the run before. */
function show(node, files) {
    let widget = node.widgets?.find((other) => other.name === NAME);
    if (!widget) {
        const list = Object.assign(document.createElement("div"), { className: "tessera-files", role: "group", ariaLabel: "Saved files" });
        list.addEventListener("pointerdown", (event) => event.stopPropagation()); // is no drag of the node
        const height = () => LINE * list.children.length + 2 * MARGIN;
        const options = { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height };
        widget = node.addDOMWidget(NAME, "TESSERA_FILES", list, options);
        widget.serialize = false; // the option is about the API export, this about the saved workflow
    }
    widget.element.replaceChildren(...files.map(line));
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

/** The node of a key of ComfyUI's outputs: its id, behind that of the subgraph where it lies in one. */
function nodeOf(key) {
    const [id, subgraph] = key.split(":").reverse();
    const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
    return graph?.getNodeById(id);
}

document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
app.registerExtension({
    name: "Tessera.SavedFiles",
    beforeRegisterNodeDef(type, { name }) {
        if (!name.startsWith("Tessera")) return;
        const executed = type.prototype.onExecuted;
        type.prototype.onExecuted = function (output) {
            executed?.call(this, output);
            if (output[NAME]) show(this, output[NAME]);
        };
    },
    onNodeOutputsUpdated(outputs) { // another tab, or a run of the history, was opened
        for (const [key, output] of Object.entries(outputs)) {
            const node = output[NAME] && nodeOf(key);
            if (node) show(node, output[NAME]);
        }
    },
});
