// The Metal kernels as text, embedded at build time on every platform (cmake/embed_metal.cmake).
//
// Metal compiles at run time and has no include path, so in these texts the includes between our
// own files are replaced by the files; only system headers such as <metal_stdlib> are left.
#pragma once

#include <string_view>
#include <vector>

namespace optiq::metal {

/** The files of metal/ that are embedded, sorted: "common.h", "qmv.metal", ... */
std::vector<std::string_view> names();

/** The flattened text of one file, pure ASCII; throws std::invalid_argument for an unknown name. */
std::string_view source(std::string_view name);

/**
 * 16 hexadecimal digits that change with the text. MLX keeps the libraries of a process by name
 * alone, so the name of a library must have this in it.
 */
std::string_view source_hash(std::string_view name);

} // namespace optiq::metal
