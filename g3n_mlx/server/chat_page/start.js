// The page begins where it was left.

async function start() {
  showTheme(kept("theme"));
  showTemperature();
  await openStore();
  await openConversation(location.hash.slice(1));
  ready();
  if (!database) notice("This browser keeps no data for the page: conversations last until it is closed.");
  await showModel();
  showContext();
}

const started = start();
