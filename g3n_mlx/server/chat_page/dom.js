"use strict";
// Text of the model enters the page through text nodes alone: nothing here writes HTML, and the policy forbids it.

const $ = (id) => document.getElementById(id);

function make(tag, classes = "", ...children) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...children);
  return node;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

const ICONS = {
  copy: "M9 9h10v10H9zM5 15V5h10",
  done: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 8a8 8 0 1 0 1 6M19 3v5h-5",
  cross: "M6 6l12 12M18 6L6 18",
  sound: "M4 10v4M8 7v10M12 4v16M16 8v8M20 10v4",
  video: "M4 6h11v12H4zM15 10l5-3v10l-5-3",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  on: "M5 5l9 7-9 7zM18 5v14",
  down: "M12 4v11M7 11l5 5 5-5M5 20h14",
  file: "M6 3h8l4 4v14H6zM14 3v4h4",
};

function tool(name, path, action) {
  const button = make("button", "tool", icon(path), name);
  button.type = "button";
  button.addEventListener("click", action);
  return button;
}

function copier(text) {
  const button = tool("Copy", ICONS.copy, async () => {
    await navigator.clipboard.writeText(text());
    button.replaceChildren(icon(ICONS.done), "Copied");
    setTimeout(() => button.replaceChildren(icon(ICONS.copy), "Copy"), 1500);
  });
  button.hidden = !navigator.clipboard; // browsers have one on https and localhost alone
  return button;
}
