// Other tabs with this page. Each follows what the others keep, and leaves alone what is written or answered in itself.

const channel = window.BroadcastChannel && new BroadcastChannel("g3n_mlx");

/** Says that conversations have changed. */
function tellTabs() {
  channel?.postMessage(null);
}

async function follow() {
  if (!database) return;
  const stored = new Map((await readConversations()).map((record) => [record.id, record]));
  const unwritten = new Set([...remembered.messages.values()].map((message) => message.conversation));
  for (const id of remembered.conversations.keys()) {
    if (!stored.has(id) && !unwritten.has(id)) remembered.conversations.delete(id);
  }
  for (const [id, record] of stored) {
    if (id === conversation?.id) conversation.title = record.title;
    else remembered.conversations.set(id, record);
  }
  if (conversation && !remembered.conversations.has(conversation.id)) leaveDeleted();
  else if (conversation) await followBranch(stored.get(conversation.id));
  showList();
}

/** The open conversation is gone; what is being written stays, and becomes the draft of a new one. */
function leaveDeleted() {
  stop();
  conversation = null;
  nodes = new Map();
  finishEditing();
  history.replaceState(null, "", location.pathname);
  showBranch();
  saveDraft();
  saveDraftMedia();
}

/** Shows what another tab has added to the open conversation, where it goes on from what is shown here. */
async function followBranch(record) {
  const shown = () => JSON.stringify([branch(), nodes.size]), before = shown(), known = nodes;
  for (const node of await everyMessage(conversation.id)) {
    const here = known.get(node.id);
    if (!here) known.set(node.id, node);
    else if (!running) Object.assign(here, node, { media: here.media });
  }
  if (running || known !== nodes) return;
  for (let node = nodes.get(record?.leaf); node; node = nodes.get(node.parent)) {
    if (node.id === conversation.leaf) conversation.leaf = record.leaf;
  }
  if (shown() !== before) showBranch();
}

channel?.addEventListener("message", follow);
