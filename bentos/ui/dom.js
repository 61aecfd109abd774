// Making elements. Text only ever enters the page as text: nothing here, or elsewhere, parses HTML.

/** `make("td", {class: "x", "aria-label": "y"}, "text", child)`; attributes that are null or false are left out. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** `0.8342` -> `0.83`; a minus sign is a minus sign. */
export function formatValue(value, digits = 2) {
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Names of the texts: 1, 2, 3 in one list; a1, a2 and b1, b2 in two. */
export const nameText = (two, list, at) => `${two ? list : ""}${at + 1}`;
