#include "cluster/launch_dir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#define SHM_ROOT "/dev/shm"

static const char *scratch_root(void)
{
    const char *tmp = getenv("TMPDIR");
    return tmp && *tmp == '/' ? tmp : "/tmp";
}

/* ---- clearing away ---- */

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st, (void)kind, (void)at;
    remove(path);
    return 0;
}

static void remove_tree(const char *path)
{
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

/* Removes the files of SHM_ROOT that `ours` says are ours. */
static void remove_segments(bool (*ours)(const char *name, uint64_t key), uint64_t key)
{
    DIR *dir = opendir(SHM_ROOT);
    for (struct dirent *e; dir && (e = readdir(dir));)
        if (ours(e->d_name, key))
            unlinkat(dirfd(dir), e->d_name, 0); /* never a folder */
    if (dir)
        closedir(dir);
}

static bool is_window(const char *name, uint64_t job)
{
    char prefix[40];
    snprintf(prefix, sizeof prefix, "convoke-%016llx-", (unsigned long long)job);
    return strncmp(name, prefix, strlen(prefix)) == 0;
}

/* "vader_segment.HOST.UID.JOBID.RANK", JOBID in hex with the number of mpirun's job family above its lower 16 bits. */
static bool is_vader_segment(const char *name, uint64_t family)
{
    if (strncmp(name, "vader_segment.", 14) != 0)
        return false;
    const char *rank = strrchr(name, '.'), *job = rank;
    while (job > name + 14 && *--job != '.')
        ;
    return strtoull(job + 1, NULL, 16) >> 16 == family;
}

static void remove_windows(const char *shm)
{
    char path[4200];
    unsigned long long job = 0;
    snprintf(path, sizeof path, "%s/job", shm);
    FILE *f = fopen(path, "re");
    if (f && fscanf(f, "%16llx", &job) == 1 && job != 0)
        remove_segments(is_window, job);
    if (f)
        fclose(f);
}

/* An mpirun that was killed leaves its session folder; its contact.txt begins with the number of its job family. */
static int visit_contact(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st;
    if (kind != FTW_F || strcmp(path + at->base, "contact.txt") != 0)
        return 0;
    FILE *f = fopen(path, "re");
    unsigned long long job = 0;
    if (f && fscanf(f, "%20llu", &job) == 1 && job >> 16 != 0)
        remove_segments(is_vader_segment, job >> 16);
    if (f)
        fclose(f);
    return 0;
}

static void remove_scratch(const char *path)
{
    nftw(path, visit_contact, 16, FTW_PHYS | FTW_MOUNT);
    remove_tree(path);
}

static void remove_shm(const char *path)
{
    remove_windows(path);
    remove_tree(path);
}

/* ---- locks ---- */

/* The lock of a folder, or -1: somebody has it, or there is none to take. */
static int take_lock(const char *folder, int flags)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/lock", folder);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
    if (fd < 0)
        return -1;
    struct stat st;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &st) == 0 && st.st_nlink > 0)
        return fd;
    close(fd);
    return -1;
}

static void sweep_root(const char *root, void (*clear)(const char *path))
{
    char prefix[40], path[4096];
    snprintf(prefix, sizeof prefix, "convoke-%u-", (unsigned)geteuid());
    DIR *dir = opendir(root);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        struct stat st;
        if (strncmp(e->d_name, prefix, strlen(prefix)) != 0 || fstatat(dirfd(dir), e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0 ||
            !S_ISDIR(st.st_mode) || st.st_uid != geteuid() ||
            snprintf(path, sizeof path, "%s/%s", root, e->d_name) >= (int)sizeof path)
            continue;
        int lock = take_lock(path, 0);
        if (lock < 0)
            continue;
        clear(path);
        close(lock);
    }
    if (dir)
        closedir(dir);
}

void launch_dir_sweep(void)
{
    sweep_root(scratch_root(), remove_scratch);
    sweep_root(SHM_ROOT, remove_shm);
}

/* ---- making ---- */

/* A fresh folder with its lock held. Between its birth and its lock a sweep may take it away: then another one. */
static status make_folder(const char *root, uint64_t launch, char path[4096], int *lock)
{
    for (int i = 0; i < 10; i++) {
        snprintf(path, 4096, "%.3900s/convoke-%u-%d-%llu-XXXXXX", root, (unsigned)geteuid(), (int)getpid(),
                 (unsigned long long)launch);
        if (!mkdtemp(path)) {
            status st = status_fail(STATUS_IO, "cannot make a folder in %s: %s", root, strerror(errno));
            path[0] = '\0';
            return st;
        }
        *lock = take_lock(path, O_CREAT);
        if (*lock >= 0)
            return STATUS_OK;
        remove_tree(path);
    }
    path[0] = '\0';
    return status_fail(STATUS_IO, "cannot lock a folder in %s", root);
}

static status write_file(const char *path, const char *text, size_t n)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool fine = fd >= 0 && write(fd, text, n) == (ssize_t)n;
    int error = errno;
    if (fd >= 0)
        close(fd);
    return fine ? STATUS_OK : status_fail(STATUS_IO, "%s: %s", path, strerror(error));
}

static status name_windows(launch_dir *d)
{
    char path[4200], text[32];
    if (getrandom(&d->job, sizeof d->job, 0) != sizeof d->job)
        return status_fail(STATUS_IO, "the system gives no random numbers");
    snprintf(text, sizeof text, "%016llx\n", (unsigned long long)d->job);
    snprintf(path, sizeof path, "%s/job", d->shm);
    return write_file(path, text, strlen(text));
}

status launch_dir_create_scratch(uint64_t number, launch_dir *out)
{
    launch_dir d = {.scratch_lock = -1, .shm_lock = -1};
    TRY(make_folder(scratch_root(), number, d.scratch, &d.scratch_lock));
    *out = d;
    return STATUS_OK;
}

status launch_dir_create(uint64_t launch, launch_dir *out)
{
    launch_dir d = {.scratch_lock = -1, .shm_lock = -1};
    status st = make_folder(scratch_root(), launch, d.scratch, &d.scratch_lock);
    if (st == STATUS_OK && mkdir(launch_dir_file(&d, "tmp"), 0700) != 0)
        st = status_fail(STATUS_IO, "%s: %s", launch_dir_file(&d, "tmp"), strerror(errno));
    if (st == STATUS_OK && access(SHM_ROOT, W_OK) == 0)
        st = make_folder(SHM_ROOT, launch, d.shm, &d.shm_lock);
    if (st == STATUS_OK && d.shm[0])
        st = name_windows(&d);
    if (st != STATUS_OK) {
        launch_dir_remove(&d);
        return st;
    }
    *out = d;
    return STATUS_OK;
}

void launch_dir_remove(launch_dir *d)
{
    if (d->scratch[0]) {
        remove_scratch(d->scratch);
        close(d->scratch_lock);
    }
    if (d->shm[0]) {
        remove_shm(d->shm);
        close(d->shm_lock);
    }
    *d = (launch_dir){.scratch_lock = -1, .shm_lock = -1};
}

const char *launch_dir_file(const launch_dir *d, const char *name)
{
    static _Thread_local char path[4200];
    snprintf(path, sizeof path, "%s/%s", d->scratch, name);
    return path;
}

status launch_dir_write_secret(const launch_dir *d, const control_secret *secret)
{
    return write_file(launch_dir_file(d, "secret"), secret->text, (size_t)secret->n);
}

void launch_dir_remove_secret(const launch_dir *d)
{
    unlink(launch_dir_file(d, "secret"));
}
