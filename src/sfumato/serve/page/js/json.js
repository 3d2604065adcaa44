// JSON whose whole numbers may be larger than 2^53, as seeds are: they become BigInt, and are written as they came.

export function parse(text) {
  return JSON.parse(text, (name, value, context) => {
    const large = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
    return large && /^\d+$/.test(context?.source ?? "") ? BigInt(context.source) : value;
  });
}

export function write(value) {
  return JSON.stringify(value, (name, inner) => {
    if (typeof inner !== "bigint") return inner;
    if (inner <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(inner);
    if (!JSON.rawJSON) throw new Error("This browser is too old for a seed of more than 16 digits.");
    return JSON.rawJSON(inner.toString());
  });
}
