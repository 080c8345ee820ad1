// The open conversation: all its messages, and the branch that is shown, a path from a first question to its last message.

let conversation = null; // its record, null before the first question
let nodes = new Map();

const childrenOf = (parent) => [...nodes.values()].filter((node) => node.parent === parent).sort((a, b) => a.order - b.order);

/** The shown branch, questions and answers in turn. */
function branch() {
  const path = [];
  for (let node = nodes.get(conversation?.leaf); node; node = nodes.get(node.parent)) path.unshift(node);
  return path;
}

/** The last message below a node, by the newest children. */
function newestBelow(node) {
  for (;;) {
    const next = childrenOf(node.id).at(-1);
    if (!next) return node;
    node = next;
  }
}

/** The path to a question without what the server refused, which would make every further question fail. */
function pathTo(node) {
  const path = [];
  for (let at = node; at; at = nodes.get(at.parent)) path.unshift(at);
  return path.filter((at, i) => at.reason !== "refused" && path[i + 1]?.reason !== "refused");
}

/** Adds a message to a conversation's tree; removed: what goes in the same transaction, such as the draft that it was. */
async function addNode(fields, within = conversation, tree = nodes, removed = []) {
  const last = Math.max(0, ...[...tree.values()].map(({ order }) => order));
  const node = { id: newId(), conversation: within.id, order: Math.max(Date.now(), last + 1), ...fields };
  tree.set(node.id, node);
  within.leaf = node.id;
  within.updated = Date.now();
  await write([["messages", node], ["conversations", within]], removed);
  showList();
  return node;
}

/** A message as the server takes it. */
async function asSent({ role, text, media = [] }) {
  const parts = await Promise.all(media.map(partOf));
  if (!parts.length) return { role, content: text };
  return { role, content: text ? [...parts, { type: "text", text }] : parts };
}

function titleOf(text, media) {
  const line = text.split("\n", 1)[0].trim() || media[0]?.file.name || "Conversation";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

async function openConversation(id) {
  stop();
  const record = remembered.conversations.get(id);
  conversation = record || null;
  nodes = new Map(record ? (await everyMessage(id)).map((node) => [node.id, node]) : []);
  if (record && !nodes.has(record.leaf)) record.leaf = [...nodes.keys()].at(-1) || null;
  const wanted = record ? `#${id}` : "";
  if (location.hash !== wanted) history.pushState(null, "", wanted || location.pathname);
  notice("");
  sticks = true;
  await showDraft();
  showBranch();
  showList();
}
