// Where things are: blocks in the list of a tile, chunks in shared memory, elements in a warp.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CAC_FAST_BOTH __host__ __device__ __forceinline__
#else
#define CAC_FAST_BOTH inline
#endif

namespace cac_fast::cuda {

// The blocks of negatives that a tile meets, as a list of places: first the `unmasked` ones
// [0, low) and [high, full), then [low, skip), [resume, high) and what is left behind `full`.
struct Walk {
  int low, skip, resume, high, full;

  CAC_FAST_BOTH int unmasked() const { return low + full - high; }

  CAC_FAST_BOTH int block(int place) const {
    if (place < unmasked()) return place < low ? place : place + (high - low);
    int block = place - unmasked() + low;
    if (block >= skip) block += resume - skip;
    if (block >= high) block += full - high;
    return block;
  }
};

// Shared memory holds rows of whole 128 bytes, in chunks of 16 bytes, the unit of copies and of
// matrix loads. Its 32 banks are 8 chunks wide: with chunks exchanged by the row's number, 8 rows
// of one chunk (a matrix), and 8 chunks of one row, lie in different banks.
constexpr int kChunk = 16;

CAC_FAST_BOTH int chunk_offset(int row, int chunk, int pitch) {
  return row * pitch + (chunk ^ (row & 7)) * kChunk;
}

// What stands `chunks` (an even number) and `rows` (a multiple of 8) after an even or odd chunk at
// `offset`: constants, of which one is known to stay below 128 bytes and to need no carry.
CAC_FAST_BOTH int moved(int offset, int rows, int chunks, int pitch) {
  return (offset ^ ((chunks & 7) * kChunk)) + (chunks & ~7) * kChunk + rows * pitch;
}

// Chunk 4 * i + t of a row, where all but t are constants: one lane's offset for each row % 4.
CAC_FAST_BOTH int quarter_offset(int row, int i, int t, int pitch) {
  return (t ^ (row & 3)) * kChunk + (row * pitch + (4 * i ^ (row & 4)) * kChunk);
}

// A lane of a warp is g = lane / 4 and t = lane % 4 in the layouts of the matrix unit. The four
// matrices of one load are the quarters of 16 rows x 2 chunks; matrix lane / 8 gets its row
// lane % 8 from this lane, at this offset. Rows first: the order of the operand a (and,
// transposed, of b).
CAC_FAST_BOTH int rows_first(int lane, int pitch) {
  return chunk_offset((lane & 7) + (lane & 8), lane >> 4, pitch);
}

// Chunks first: the order of the operand b of two neighboring products, stored with b's columns
// as rows.
CAC_FAST_BOTH int chunks_first(int lane, int pitch) {
  return chunk_offset((lane & 7) + ((lane & 16) >> 1), (lane >> 3) & 1, pitch);
}

}  // namespace cac_fast::cuda
