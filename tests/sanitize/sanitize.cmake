# LIBI_SANITIZE=address (with undefined behaviour) or thread: the kernels under a sanitizer, and fuzz.cpp linked to them.
# CMakeLists.txt includes this last; `make sanitize` builds and runs both.
if(LIBI_SANITIZE STREQUAL "address")
  set(checks -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
elseif(LIBI_SANITIZE STREQUAL "thread")
  set(checks -fsanitize=thread)
else()
  message(FATAL_ERROR "LIBI_SANITIZE is '${LIBI_SANITIZE}', expected address or thread")
endif()
include(CheckCXXSourceCompiles)
set(CMAKE_REQUIRED_FLAGS "${checks}")
string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${CMAKE_REQUIRED_FLAGS}")
check_cxx_source_compiles("int main() { return 0; }" has_sanitizer)
if(NOT has_sanitizer)
  message(FATAL_ERROR "${CMAKE_CXX_COMPILER} cannot link ${checks}: install GCC's libasan, libubsan and libtsan (Debian: g++)")
endif()

# -O1 keeps reports readable and the build short. The sanitizers' own code draws false warnings of uninitialised memory.
target_compile_options(kernel_options INTERFACE ${checks} -O1 -g -fno-omit-frame-pointer -Wno-maybe-uninitialized)
target_link_options(kernel_options INTERFACE ${checks})
add_executable(libi_fuzz tests/sanitize/fuzz.cpp kernels/dispatch.cpp ${kernel_objects})
target_link_libraries(libi_fuzz PRIVATE kernel_options)
target_compile_definitions(libi_fuzz PRIVATE $<$<BOOL:${x86_levels}>:LIBI_X86_LEVELS>)

if(LIBI_SANITIZE STREQUAL "thread")
  # ThreadSanitizer does not see what libgomp's threads wait for, and would report every parallel loop: openmp.cpp
  # stands in for it. -fopenmp stays, but nothing links the library.
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    message(FATAL_ERROR "LIBI_SANITIZE=thread needs GCC, found ${CMAKE_CXX_COMPILER_ID}: install g++ and set CXX=g++")
  endif()
  find_package(Threads REQUIRED)
  set_target_properties(kernel_options PROPERTIES INTERFACE_LINK_LIBRARIES Threads::Threads)
  target_compile_options(kernel_options INTERFACE -fopenmp)
  target_sources(libi_fuzz PRIVATE tests/sanitize/openmp.cpp)
  target_sources(libi_kernels PRIVATE tests/sanitize/openmp.cpp)
endif()
