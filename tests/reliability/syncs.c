/* Keeps, for each file of a database, what a power loss can't take: a copy of it as it was at its last flush.
 * Loaded into the writers by LD_PRELOAD. SWARM_DURABLE names the folder of the copies. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static int flush(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *folder = getenv("SWARM_DURABLE");
    char link[64], path[PATH_MAX], lock_path[PATH_MAX + 32], part[PATH_MAX + 32], whole[PATH_MAX + 32], buffer[65536];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (folder == NULL || length < 0) return real(fd);
    path[length] = 0;
    const char *base = strrchr(path, '/');
    if (base == NULL || strstr(base, ".db") == NULL) return real(fd);
    snprintf(lock_path, sizeof lock_path, "%s%s.lock", folder, base);
    snprintf(part, sizeof part, "%s%s.part", folder, base);
    snprintf(whole, sizeof whole, "%s%s", folder, base);
    int lock = open(lock_path, O_CREAT | O_RDWR, 0600);
    flock(lock, LOCK_EX); /* Else an earlier copy could replace a later one. */
    int copy = open(part, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    ssize_t got;
    for (off_t at = 0; (got = pread(fd, buffer, sizeof buffer, at)) > 0; at += got)
        if (write(copy, buffer, got) != got) abort();
    close(copy);
    int result = real(fd);
    if (result == 0) rename(part, whole);
    close(lock);
    return result;
}

int fsync(int fd) { return flush("fsync", fd); }
int fdatasync(int fd) { return flush("fdatasync", fd); }
