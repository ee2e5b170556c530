// Runs before the first paint, so that the page never shows the other colours first.
"use strict";
try {
  const theme = JSON.parse(localStorage.getItem("sagellm.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is blocked: the system's colours it is.
}
