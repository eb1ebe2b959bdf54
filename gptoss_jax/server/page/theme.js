// Before the first paint: a theme that the reader chose wins over the system's.
try {
  const theme = localStorage.getItem("gptoss.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage: the system's theme
}
