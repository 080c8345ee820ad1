// The page begins.

showTheme(kept("theme"));
showTemperature();
ready();
showModel();
