// Put before the C library (LD_PRELOAD): reads of safetensors files go wrong by chance, as FAULTY_PREAD says:
// "seed=1,short=20,eintr=10,eio=0,delay_us=200", the first three in percent of the calls.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_uint calls;

static unsigned setting(const char* name) {
    const char* all = getenv("FAULTY_PREAD");
    const char* at = all ? strstr(all, name) : NULL;
    return at ? (unsigned)atoi(at + strlen(name) + 1) : 0;
}

static unsigned chance(void) {
    unsigned x = setting("seed") * 2654435761u + atomic_fetch_add(&calls, 1) * 40503u + 1;
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    return x;
}

static int is_shard(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strstr(path, ".safetensors") != NULL;
}

// What is to become of a call for `want` bytes: the bytes it may read, or a negative errno.
static ssize_t fate(int fd, size_t want) {
    if (!is_shard(fd)) return (ssize_t)want;
    const unsigned x = chance();
    if (setting("delay_us")) usleep(x % (setting("delay_us") + 1));
    unsigned percent = (x >> 8) % 100;
    if (percent < setting("eio")) return -EIO;
    percent -= setting("eio");
    if (percent < setting("eintr")) return -EINTR;
    percent -= setting("eintr");
    // A direct read ends at a block.
    if (percent < setting("short") && want > 4096) return (ssize_t)(4096 * (1 + (x >> 16) % (want / 4096)));
    return (ssize_t)want;
}

typedef ssize_t (*Pread)(int, void*, size_t, off_t);

static ssize_t faulty(const char* name, int fd, void* buffer, size_t nbytes, off_t offset) {
    const ssize_t may = fate(fd, nbytes);
    if (may < 0) {
        errno = (int)-may;
        return -1;
    }
    return ((Pread)dlsym(RTLD_NEXT, name))(fd, buffer, (size_t)may < nbytes ? (size_t)may : nbytes, offset);
}

ssize_t pread(int fd, void* buffer, size_t nbytes, off_t offset) {
    return faulty("pread", fd, buffer, nbytes, offset);
}

ssize_t pread64(int fd, void* buffer, size_t nbytes, off_t offset) {
    return faulty("pread64", fd, buffer, nbytes, offset);
}

// Python reads through this one.
ssize_t preadv64v2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
    if (count == 1) return faulty("pread", fd, parts->iov_base, parts->iov_len, offset);
    return ((ssize_t (*)(int, const struct iovec*, int, off_t, int))dlsym(RTLD_NEXT, "preadv64v2"))(fd, parts, count,
                                                                                                    offset, flags);
}

ssize_t preadv2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
    return preadv64v2(fd, parts, count, offset, flags);
}
