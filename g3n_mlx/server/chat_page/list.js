// The list of conversations: opened, searched, renamed, deleted, exported and imported.

let found = null; // ids that hold what is searched for; null without a search

function listed() {
  const all = [...remembered.conversations.values()].sort((a, b) => b.updated - a.updated);
  return found ? all.filter(({ id }) => found.has(id)) : all;
}

function showList() {
  const rows = listed();
  $("list").replaceChildren(...rows.map((record) => {
    const open = make("button", "name", record.title);
    open.type = "button";
    open.dataset.id = record.id;
    if (record.id === conversation?.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", async () => {
      $("conversations").hidePopover();
      await openConversation(record.id);
      $("text").focus();
    });
    const rename = tool("", ICONS.edit, () => renaming(record, row));
    rename.setAttribute("aria-label", `Rename ${record.title}`);
    const save = tool("", ICONS.down, () => exportFile([record], record.title));
    save.setAttribute("aria-label", `Export ${record.title}`);
    const why = "It goes with everything in it, and can't be brought back.";
    const away = tool("", ICONS.cross, () => confirmed(`Delete “${record.title}”?`, why, () => deleted(record.id)));
    away.setAttribute("aria-label", `Delete ${record.title}`);
    const row = make("li", "", open, rename, save, away);
    return row;
  }));
  $("no-list").hidden = rows.length > 0;
  $("no-list").textContent = found ? "Nothing found." : "What you ask is kept here, in this browser alone.";
}

async function deleted(id) {
  const isOpen = id === conversation?.id;
  if (isOpen) {
    stop();
    conversation = null;
  }
  await dropConversation(id);
  tellTabs();
  if (isOpen) await openConversation(null);
  showList();
}

function renaming(record, row) {
  let byKey = false; // then the focus goes back to the row
  const field = make("input");
  field.value = record.title;
  field.setAttribute("aria-label", "Title");
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Escape") event.preventDefault();
    if (event.key === "Enter" || event.key === "Escape") {
      if (event.key === "Escape") field.value = record.title;
      byKey = true;
      field.blur();
    }
  });
  field.addEventListener("blur", async () => {
    record.title = field.value.trim() || record.title;
    await keep("conversations", record);
    tellTabs();
    showList();
    if (byKey) $("list").querySelector(`[data-id="${record.id}"]`)?.focus();
  }, { once: true });
  row.replaceChildren(field);
  field.select();
}

async function search() {
  const words = $("search").value.trim().toLowerCase();
  if (words) {
    const has = (text) => text.toLowerCase().includes(words);
    const titles = [...remembered.conversations.values()].filter(({ title }) => has(title));
    const texts = (await everyMessage()).filter(({ text, media }) => has(text) || media?.some(({ file }) => has(file.name)));
    found = new Set([...titles.map(({ id }) => id), ...texts.map((message) => message.conversation)]);
  } else {
    found = null;
  }
  showList();
}

let onConfirmed = null;
let confirmedFrom = null; // the button that asked

function confirmed(title, why, action) {
  $("confirm-title").textContent = title;
  $("confirm-why").textContent = why;
  onConfirmed = action;
  confirmedFrom = document.activeElement;
  $("confirm").showModal();
}

$("confirm").addEventListener("close", () => {
  $("conversations").showPopover(); // which the dialog has closed
  confirmedFrom.focus();
  if ($("confirm").returnValue === "yes") onConfirmed();
  $("confirm").returnValue = "";
});
for (const [id, value] of [["confirm-yes", "yes"], ["confirm-no", ""]]) $(id).addEventListener("click", () => $("confirm").close(value));

// Export and import: one JSON file with conversations, their media in base64.

async function exported(conversations) {
  const written = async ({ kind, file }) => ({ kind, name: file.name, type: file.type, data: await base64Of(file) });
  const messages = [];
  for (const { id } of conversations) {
    for (const message of await everyMessage(id)) {
      messages.push({ ...message, media: await Promise.all((message.media || []).map(written)) });
    }
  }
  return JSON.stringify({ format: "g3n_mlx conversations", version: 1, conversations, messages }, null, 1);
}

async function exportFile(conversations, name) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([await exported(conversations)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function bytes(data) {
  return Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
}

/** The records of a file that was exported; throws when it is another. */
function readExport(text) {
  const { format, version, conversations, messages } = JSON.parse(text);
  if (format !== "g3n_mlx conversations" || version !== 1) throw new Error("no export of this page");
  const ids = new Map(conversations.map(({ id }) => [id, newId()]));
  const renamed = new Map(messages.map(({ id }) => [id, newId()]));
  const fileOf = ({ name, type, data }) => new File([bytes(data)], String(name), { type: String(type) });
  return {
    conversations: conversations.map(({ id, title, created, updated, leaf }) => ({
      id: ids.get(id),
      title: String(title),
      created: Number(created),
      updated: Number(updated),
      leaf: renamed.get(leaf) || null,
    })),
    messages: messages.filter((message) => ids.has(message.conversation)).map((message) => ({
      id: renamed.get(message.id),
      conversation: ids.get(message.conversation),
      parent: renamed.get(message.parent) || null,
      order: Number(message.order),
      role: message.role === "user" ? "user" : "assistant",
      text: String(message.text),
      reason: message.reason,
      usage: message.usage,
      failure: message.failure,
      media: (message.media || []).map((entry) => ({ kind: String(entry.kind), file: fileOf(entry) })),
    })),
  };
}

/** Adds what a file holds to what is here; a conversation that is here already comes a second time. */
async function importFile(file) {
  let records;
  try {
    records = readExport(await file.text());
  } catch {
    $("conversations").hidePopover(); // it would cover the notice
    notice(`${file.name} can't be imported: expected a file that this page exported.`);
    return;
  }
  if (!(await withinBounds(records.messages.flatMap(({ media }) => media)))) return;
  await write(Object.entries(records).flatMap(([store, some]) => some.map((record) => [store, record])));
  tellTabs();
  showList();
}

$("export").addEventListener("click", () => {
  exportFile([...remembered.conversations.values()], `conversations ${new Date().toISOString().slice(0, 10)}`);
});
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async () => {
  const [file] = $("import-file").files;
  if (file) await importFile(file);
  $("import-file").value = "";
});
$("clear").addEventListener("click", () => {
  confirmed("Delete all conversations?", "Everything that this page keeps in this browser goes, drafts too.", async () => {
    stop();
    conversation = null;
    $("text").value = "";
    chosen = [];
    await dropEverything();
    tellTabs();
    await openConversation(null);
  });
});
$("search").addEventListener("input", search);
$("conversations").addEventListener("toggle", (event) => $("conversations-button").setAttribute("aria-expanded", event.newState === "open"));
