// What is kept between visits, the key until the tab is closed; a browser may refuse to keep anything.

const inMemory = new Map();

function kept(name, value) {
  const box = name === "key" ? "sessionStorage" : "localStorage";
  if (value !== undefined) inMemory.set(name, value);
  try {
    if (value !== undefined) window[box].setItem(name, value);
    return inMemory.get(name) ?? window[box].getItem(name) ?? "";
  } catch {
    return inMemory.get(name) ?? "";
  }
}

let key = kept("key");
