// From a value to a colour. Below the decision threshold the scale is cool, from it on warm; lightness runs one way
// through both, so that the order stays readable without hue.

const SCALES = {
  light: {
    cool: ["#f4f2ec", "#dfe8ee", "#bfd3e1", "#94b6cc"],
    warm: ["#d98d63", "#b4542d", "#7a3114", "#54200b"],
    plain: ["#f4f2ec", "#cfdde7", "#94b6cc", "#4f7c99", "#2f4858", "#1b2e3a"],
  },
  dark: {
    cool: ["#1d2931", "#26404f", "#335c73", "#477a94"],
    warm: ["#c06a42", "#dc8d61", "#f0b48c", "#fbdcc0"],
    plain: ["#1d2931", "#28485a", "#3d708b", "#66a0bd", "#a3cbe0", "#e2f1f9"],
  },
};
const SOFT_INKS = { light: "#14212a", dark: "#f2efe8" };
const AA = 4.5; // contrast that WCAG AA asks of small text

export const darkTheme = window.matchMedia("(prefers-color-scheme: dark)");

const themeName = () => (darkTheme.matches ? "dark" : "light");
const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const clamp = (share) => Math.min(1, Math.max(0, share));

function mix(stops, share) {
  const place = clamp(share) * (stops.length - 1);
  const at = Math.min(Math.floor(place), stops.length - 2);
  const [low, high] = [parse(stops[at]), parse(stops[at + 1])];
  return low.map((part, index) => Math.round(part + (high[index] - part) * (place - at)));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((part) => (part <= 10.31 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(one, other) {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}

/** The calm ink where it is readable, else black or white: one of the two always reaches 4.5. */
function inkOn(background) {
  for (const soft of Object.values(SOFT_INKS)) if (contrast(background, parse(soft)) >= AA + 1) return soft;
  return contrast(background, [0, 0, 0]) >= contrast(background, [255, 255, 255]) ? "#000000" : "#ffffff";
}

/**
 * A scale from `low` to `high`; `threshold` null: one hue throughout.
 * `colour(value, warm)` gives {background, ink}; `warm` is decided by the caller, on the cosine.
 */
export function makeScale({ low, high, threshold }) {
  const stops = SCALES[themeName()];
  const share = (value, from, to) => (to > from ? (value - from) / (to - from) : value >= to ? 1 : 0);
  return {
    low,
    high,
    threshold,
    colour(value, warm) {
      let rgb;
      if (threshold === null) rgb = mix(stops.plain, share(value, low, high));
      else if (warm) rgb = mix(stops.warm, share(value, threshold, high));
      else rgb = mix(stops.cool, share(value, low, threshold));
      return { background: `rgb(${rgb.join(" ")})`, ink: inkOn(rgb) };
    },
  };
}
