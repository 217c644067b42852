/** The page's elements by their id; a missing one is a mistake in `index.html`. */
export function element<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found as T;
}

export function fillSelect(select: HTMLSelectElement, values: Iterable<string>, chosen?: string): void {
  select.replaceChildren(...[...values].map((value) => new Option(value, value)));
  if (chosen !== undefined) select.value = chosen;
}

let toastTimer: ReturnType<typeof setTimeout>;

/** Say something in passing. */
export function toast(text: string, bad = false): void {
  const place = element("toast");
  place.textContent = text;
  place.classList.add("shown");
  place.classList.toggle("bad", bad);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => place.classList.remove("shown"), bad ? 8000 : 3500);
}
