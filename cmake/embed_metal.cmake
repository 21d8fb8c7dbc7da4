# Writes a C++ file that holds the files of metal/ as string constants; see csrc/metal/source.h.
#
#   cmake -DSOURCE_DIR=metal -DOUT=metal_source.cpp -P cmake/embed_metal.cmake
#
# A failed check stops the build here, because off a Mac nothing later would notice: Metal gets
# the text as ASCII, without an include path, and only when a kernel first runs.
cmake_minimum_required(VERSION 3.20)

# Text is always quoted below and never put in a list: Metal code is full of `;` and `[[ ]]`.
function(read_checked name out)
  if(NOT EXISTS "${SOURCE_DIR}/${name}")
    message(FATAL_ERROR "metal/${name}: no such file, included by ${ARGN}")
  endif()
  file(READ "${SOURCE_DIR}/${name}" text)
  string(REGEX MATCH "[^\t\n -~]" bad "${text}")
  if(bad)
    string(FIND "${text}" "${bad}" at)
    string(SUBSTRING "${text}" 0 ${at} before)
    string(REGEX REPLACE "[^\n]" "" before "${before}")
    string(LENGTH "${before}" line)
    math(EXPR line "${line} + 1")
    message(FATAL_ERROR "metal/${name}:${line}: not ASCII, which is all that Metal is given")
  endif()
  # Each file comes once anyway, and in a main file the pragma is a warning.
  string(REGEX REPLACE "(^|\n)#pragma once[^\n]*" "\\1" text "${text}")
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

# Replaces the first include until none is left; the replaced text is searched in turn, so nested
# includes are reached, and a file met a second time (or in a circle) leaves nothing.
function(flatten name out)
  read_checked(${name} text "nothing")
  set(seen ${name})
  while("${text}" MATCHES "(^|\n)[ \t]*#[ \t]*include[ \t]*\"([^\"\n]*)\"[^\n]*")
    set(whole "${CMAKE_MATCH_0}")
    set(start "${CMAKE_MATCH_1}")
    set(included "${CMAKE_MATCH_2}")
    set(body "")
    if(NOT included IN_LIST seen)
      list(APPEND seen "${included}")
      read_checked("${included}" body "metal/${name}")
    endif()
    string(FIND "${text}" "${whole}" at)
    string(LENGTH "${whole}" length)
    string(SUBSTRING "${text}" 0 ${at} before)
    math(EXPR at "${at} + ${length}")
    string(SUBSTRING "${text}" ${at} -1 after)
    set(text "${before}${start}${body}${after}")
  endwhile()
  if("${text}" MATCHES "\\)MSL\"")
    message(FATAL_ERROR "metal/${name}: contains the end mark of the C++ string it is kept in")
  endif()
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

set(entries "")
file(GLOB files RELATIVE "${SOURCE_DIR}" "${SOURCE_DIR}/*.h" "${SOURCE_DIR}/*.metal")
list(SORT files)
foreach(name IN LISTS files)
  flatten("${name}" text)
  string(SHA256 hash "${text}")
  string(SUBSTRING "${hash}" 0 16 hash)
  string(APPEND entries "    {\"${name}\", \"${hash}\", R\"MSL(${text})MSL\"},\n")
endforeach()

file(CONFIGURE OUTPUT "${OUT}" @ONLY CONTENT [[
// Written by cmake/embed_metal.cmake; do not edit.
#include "metal/source.h"

#include <stdexcept>
#include <string>

namespace optiq::metal {

namespace {

struct Source {
  std::string_view name, hash, text;
};

constexpr Source kSources[] = {
@entries@    {}, // an empty folder builds too
};

const Source& find(std::string_view name) {
  for (const Source& source : kSources) {
    if (source.name == name && !name.empty()) {
      return source;
    }
  }
  throw std::invalid_argument("[metal] no kernel source named " + std::string(name));
}

} // namespace

std::vector<std::string_view> names() {
  std::vector<std::string_view> all;
  for (const Source& source : kSources) {
    if (!source.name.empty()) {
      all.push_back(source.name);
    }
  }
  return all;
}

std::string_view source(std::string_view name) {
  return find(name).text;
}

std::string_view source_hash(std::string_view name) {
  return find(name).hash;
}

} // namespace optiq::metal
]])
