// One translation unit, so that the compiler can inline across the parts.
#include "check.cpp"
#include "coalescing.cpp"
#include "collective.cpp"
#include "fiber.cpp"
#include "launch.cpp"
#include "memory.cpp"
#include "schedule.cpp"
