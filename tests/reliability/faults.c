/* Faults of the file system, for tests: preloaded (LD_PRELOAD), it counts the calls of this process
 * that change files below a folder, and at the nth of them kills the process, leaves a write half
 * done and kills, or makes it fail. Python and safetensors both write through these functions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, HALF_THEN_KILL, FAIL_ONCE, FAIL_FROM };

static int action = OFF, number = 0, counted = 0, nth = 0, trace = -1;
static char folder[PATH_MAX];

/* Called by the process that is to meet the fault; `below` must be a resolved path. */
void faults_arm(const char* below, int what, int at, int error, int trace_to) {
  snprintf(folder, sizeof folder, "%s", below);
  counted = 0, nth = at, number = error, trace = trace_to;
  action = what;
}

static int below_folder(const char* path) {
  size_t length = strlen(folder);
  return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

static int path_of(int descriptor, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = '\0';
  return 1;
}

/* Which call this is, and whether it is the one to meet the fault. */
static int is_due(const char* call, const char* path) {
  if (action == OFF || !below_folder(path)) return 0;
  int here = ++counted;
  if (trace >= 0) dprintf(trace, "%d %s %s\n", here, call, path + strlen(folder));
  if (action == COUNT) return 0;
  return action == FAIL_FROM ? here >= nth : here == nth;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

/* -1 with errno set if the call is to fail; 0 if it is to be made. */
static int fault(const char* call, const char* path) {
  if (!is_due(call, path)) return 0;
  if (action == KILL || action == HALF_THEN_KILL) die();
  /* A full disk still deletes, renames and synchronises. */
  int frees = !strcmp(call, "unlink") || !strcmp(call, "rmdir") || !strcmp(call, "rename") ||
              !strcmp(call, "fsync") || !strcmp(call, "chmod");
  if ((number == ENOSPC || number == EDQUOT) && frees) return 0;
  errno = number;
  return -1;
}

static int fault_at(const char* call, int directory, const char* path) {
  char whole[2 * PATH_MAX];
  if (action == OFF) return 0;
  if (path[0] == '/') {
    snprintf(whole, sizeof whole, "%s", path);
  } else {
    char base[PATH_MAX];
    if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(directory, base)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
  }
  return fault(call, whole);
}

static int fault_of(const char* call, int descriptor) {
  char path[PATH_MAX];
  return action != OFF && path_of(descriptor, path) ? fault(call, path) : 0;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                  \
  int name(const char* path, int flags, ...) {                                      \
    va_list rest;                                                                   \
    va_start(rest, flags);                                                          \
    int mode = va_arg(rest, int);                                                   \
    va_end(rest);                                                                   \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fault_at("open", AT_FDCWD, path)) \
      return -1;                                                                    \
    return REAL(int, name, const char*, int, ...)(path, flags, mode);               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
  int name(int directory, const char* path, int flags, ...) {                        \
    va_list rest;                                                                    \
    va_start(rest, flags);                                                           \
    int mode = va_arg(rest, int);                                                    \
    va_end(rest);                                                                    \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fault_at("open", directory, path)) \
      return -1;                                                                     \
    return REAL(int, name, int, const char*, int, ...)(directory, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void* bytes, size_t size) {
  char path[PATH_MAX];
  if (action == OFF || !path_of(descriptor, path) || !is_due("write", path))
    return REAL(ssize_t, write, int, const void*, size_t)(descriptor, bytes, size);
  /* What reaches the disk first: one half. The call after it fails outright. */
  if (action != KILL && size > 1) {
    ssize_t half = REAL(ssize_t, write, int, const void*, size_t)(descriptor, bytes, size / 2);
    if (action == HALF_THEN_KILL) die();
    if (action == FAIL_FROM && counted == nth) return half;
  }
  if (action == KILL || action == HALF_THEN_KILL) die();
  errno = number;
  return -1;
}

ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  if (fault_of("write", descriptor)) return -1;
  return REAL(ssize_t, writev, int, const struct iovec*, int)(descriptor, parts, count);
}

ssize_t pwrite64(int descriptor, const void* bytes, size_t size, off64_t offset) {
  if (fault_of("write", descriptor)) return -1;
  return REAL(ssize_t, pwrite64, int, const void*, size_t, off64_t)(descriptor, bytes, size, offset);
}

int ftruncate64(int descriptor, off64_t size) {
  if (fault_of("write", descriptor)) return -1;
  return REAL(int, ftruncate64, int, off64_t)(descriptor, size);
}

int fsync(int descriptor) {
  return fault_of("fsync", descriptor) ? -1 : REAL(int, fsync, int)(descriptor);
}

int rename(const char* from, const char* to) {
  if (fault_at("rename", AT_FDCWD, from)) return -1;
  return REAL(int, rename, const char*, const char*)(from, to);
}

int mkdir(const char* path, mode_t mode) {
  if (fault_at("mkdir", AT_FDCWD, path)) return -1;
  return REAL(int, mkdir, const char*, mode_t)(path, mode);
}

int chmod(const char* path, mode_t mode) {
  if (fault_at("chmod", AT_FDCWD, path)) return -1;
  return REAL(int, chmod, const char*, mode_t)(path, mode);
}

int unlink(const char* path) {
  if (fault_at("unlink", AT_FDCWD, path)) return -1;
  return REAL(int, unlink, const char*)(path);
}

int unlinkat(int directory, const char* path, int flags) {
  if (fault_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, path)) return -1;
  return REAL(int, unlinkat, int, const char*, int)(directory, path, flags);
}

int rmdir(const char* path) {
  if (fault_at("rmdir", AT_FDCWD, path)) return -1;
  return REAL(int, rmdir, const char*)(path);
}
