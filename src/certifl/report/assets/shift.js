// A picture shifted in both directions: ONE bilinear interpolation, by the formula and in the
// convention of the library (perturbations/warp.py), of the picture as it is.
const shift = (() => {
  const where = (index, size, half, value, geometry) =>
    (geometry === "centre" ? index : index * size / Math.max(size - 1, 1) - 0.5) + value * half;
  function cell(position, size, padding) {
    if (padding === "reflection") {
      const turn = 2 * size, folded = ((position + 0.5) % turn + turn) % turn;
      position = size - Math.abs(folded - size) - 0.5;
    }
    const [low, high] = padding === "zeros" ? [-1, size] : [0, size - 1];
    const inside = Math.min(high, Math.max(low, position)), whole = Math.floor(inside);
    return [whole, inside - whole];
  }
  const cells = (size, value, plane) =>
    Array.from({ length: size }, (_, index) => cell(where(index, size, size / 2, value, plane.geometry), size, plane.padding));

  // Pixels of a loaded picture, in its own size.
  function pixels(picture) {
    const sheet = document.createElement("canvas");
    sheet.width = picture.naturalWidth;
    sheet.height = picture.naturalHeight;
    const pen = sheet.getContext("2d");
    pen.drawImage(picture, 0, 0);
    return pen.getImageData(0, 0, sheet.width, sheet.height);
  }
  // The same shifted by (across, down): what the library calls (t_u, t_v), in half-widths.
  function shifted(source, across, down, plane) {
    const { width, height, data } = source, made = new ImageData(width, height);
    const columns = cells(width, across, plane), rows = cells(height, down, plane);
    const at = (row, column, channel) =>
      row < 0 || column < 0 || row >= height || column >= width ? 0 : data[4 * (row * width + column) + channel];
    rows.forEach(([top, under], row) => columns.forEach(([left, beside], column) => {
      const to = 4 * (row * width + column);
      for (let channel = 0; channel < 3; channel++) {
        const upper = at(top, left, channel) * (1 - beside) + at(top, left + 1, channel) * beside;
        const lower = at(top + 1, left, channel) * (1 - beside) + at(top + 1, left + 1, channel) * beside;
        made.data[to + channel] = Math.round(upper * (1 - under) + lower * under);
      }
      made.data[to + 3] = 255;
    }));
    return made;
  }
  return { pixels, shifted };
})();
