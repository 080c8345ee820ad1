// Conversations in this browser's IndexedDB. A conversation is a record with a title, its messages are a tree of records: each
// names its parent, so that an edited question or another answer is one more child, and nothing is overwritten. A browser that
// keeps nothing (a private window, a full disk) leaves them in memory until the page is closed.

const STORES = { conversations: "id", messages: "id", drafts: "id" };
const MOST_BYTES = 1 << 30; // of pictures, sound and videos; what is beyond is not kept
let database = null;
const remembered = Object.fromEntries(Object.keys(STORES).map((store) => [store, new Map()]));

const newId = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(36).padStart(2, "0")).join("");

function settled(request) {
  return new Promise((done, failed) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

async function openStore() {
  try {
    const request = indexedDB.open("g3n_mlx", 1);
    request.onupgradeneeded = () => {
      for (const [store, keyPath] of Object.entries(STORES)) request.result.createObjectStore(store, { keyPath });
      request.transaction.objectStore("messages").createIndex("conversation", "conversation");
    };
    database = await settled(request);
    for (const record of await settled(database.transaction("conversations").objectStore("conversations").getAll())) {
      remembered.conversations.set(record.id, record);
    }
    navigator.storage?.persist?.().catch(() => false);
  } catch {
    database = null;
    notice("This browser keeps no data for the page: conversations last until it is closed.");
  }
}

/** Writes a record; its media are blobs, which IndexedDB takes as they are. */
async function keep(store, record) {
  remembered[store].set(record.id, record);
  if (!database) return;
  try {
    const transaction = database.transaction(store, "readwrite", { durability: "strict" });
    const written = new Promise((done, failed) => {
      transaction.oncomplete = done;
      transaction.onabort = () => failed(transaction.error);
    });
    transaction.objectStore(store).put(record);
    await written;
  } catch (error) {
    notice(`The browser could not keep this (${error?.name || "error"}): export the conversation, or delete others.`);
  }
}

async function drop(store, id) {
  remembered[store].delete(id);
  if (database) await settled(database.transaction(store, "readwrite").objectStore(store).delete(id));
}

async function readDraft(id) {
  if (!database) return remembered.drafts.get(id);
  return settled(database.transaction("drafts").objectStore("drafts").get(id));
}

async function messagesOf(conversation) {
  const found = database
    ? await settled(database.transaction("messages").objectStore("messages").index("conversation").getAll(conversation))
    : [...remembered.messages.values()].filter((message) => message.conversation === conversation);
  return found.sort((a, b) => a.order - b.order);
}

async function everyMessage() {
  if (!database) return [...remembered.messages.values()];
  return settled(database.transaction("messages").objectStore("messages").getAll());
}

async function dropConversation(id) {
  for (const message of await messagesOf(id)) await drop("messages", message.id);
  for (const draft of [id, `${id}:media`]) await drop("drafts", draft);
  await drop("conversations", id);
}

async function dropEverything() {
  for (const store of Object.keys(STORES)) {
    remembered[store].clear();
    if (database) await settled(database.transaction(store, "readwrite").objectStore(store).clear());
  }
}

function bytesOf(messages) {
  return messages.flatMap(({ media }) => media || []).reduce((sum, { file }) => sum + file.size, 0);
}
