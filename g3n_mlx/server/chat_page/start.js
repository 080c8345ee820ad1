// The page begins where it was left.

async function start() {
  showTheme(kept("theme"));
  showTemperature();
  await openStore();
  await openConversation(location.hash.slice(1));
  ready();
  await showModel();
  showContext();
}

const started = start();
