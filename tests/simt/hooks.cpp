// The calls that the compiler makes before every memory access. Compiled without a sanitizer.
//
// -fsanitize=address, told to call functions, checks the bounds of all memory here.
// -fsanitize=thread, without its runtime library, finds races on shared memory here: two accesses
// by two threads, one of them a write, with no barrier in between, whatever the schedule; and on
// global memory: two thread blocks, one of which writes.

#include "scheduler.h"

#if defined(SIMT_CHECK_ADDRESS)
#include <sanitizer/asan_interface.h>
#endif

#define SIMT_HOOK extern "C" void

#if defined(SIMT_CHECK_ADDRESS)

extern "C" void __asan_report_load_n(void* address, size_t bytes);
extern "C" void __asan_report_store_n(void* address, size_t bytes);

#define SIMT_ACCESS(kind, write, bytes)                       \
  simt::on_access(address, bytes, write);                     \
  if (__asan_region_is_poisoned(address, bytes) != nullptr) { \
    __asan_report_##kind##_n(address, bytes);                 \
  }
#define SIMT_HOOKS(bytes)                                                             \
  SIMT_HOOK __asan_load##bytes(void* address){                                        \
      SIMT_ACCESS(load, false, bytes)} SIMT_HOOK __asan_store##bytes(void* address) { \
    SIMT_ACCESS(store, true, bytes)                                                   \
  }

SIMT_HOOK __asan_loadN(void* address, size_t bytes){SIMT_ACCESS(load, false, bytes)} SIMT_HOOK
    __asan_storeN(void* address, size_t bytes){SIMT_ACCESS(store, true, bytes)}

#elif defined(SIMT_CHECK_RACES)

#define SIMT_ACCESS(write, bytes) simt::on_access(address, bytes, write);
#define SIMT_HOOKS(bytes)                                                                 \
  SIMT_HOOK __tsan_read##bytes(void* address){                                            \
      SIMT_ACCESS(false, bytes)} SIMT_HOOK __tsan_write##bytes(void* address){            \
      SIMT_ACCESS(true, bytes)} SIMT_HOOK __tsan_unaligned_read##bytes(void* address){    \
      SIMT_ACCESS(false, bytes)} SIMT_HOOK __tsan_unaligned_write##bytes(void* address) { \
    SIMT_ACCESS(true, bytes)                                                              \
  }

SIMT_HOOK __tsan_read_range(void* address, size_t bytes){SIMT_ACCESS(false, bytes)} SIMT_HOOK
    __tsan_write_range(void* address, size_t bytes){SIMT_ACCESS(true, bytes)} SIMT_HOOK
    __tsan_vptr_update(void**, void*) {}
SIMT_HOOK __tsan_vptr_read(void**) {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_init() {}

#endif

SIMT_HOOKS(1) SIMT_HOOKS(2) SIMT_HOOKS(4) SIMT_HOOKS(8) SIMT_HOOKS(16)
