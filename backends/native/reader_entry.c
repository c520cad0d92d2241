#include "reader_entry.h"

#include <time.h>

void put_attributes(const struct stat *st, uint64_t nodeid, struct fuse_attr *out)
{
    *out = (struct fuse_attr){
        .ino = nodeid,
        .size = (uint64_t)st->st_size,
        .blocks = (uint64_t)st->st_blocks,
        .atime = (uint64_t)st->st_atim.tv_sec,
        .mtime = (uint64_t)st->st_mtim.tv_sec,
        .ctime = (uint64_t)st->st_ctim.tv_sec,
        .atimensec = (uint32_t)st->st_atim.tv_nsec,
        .mtimensec = (uint32_t)st->st_mtim.tv_nsec,
        .ctimensec = (uint32_t)st->st_ctim.tv_nsec,
        .mode = st->st_mode,
        .nlink = (uint32_t)st->st_nlink,
        .uid = st->st_uid,
        .gid = st->st_gid,
        .rdev = (uint32_t)st->st_rdev, /* the kernel's 32 bits are the lower ones of these */
        .blksize = (uint32_t)st->st_blksize,
    };
}

void put_seconds(double seconds, uint64_t *whole, uint32_t *nanoseconds)
{
    *whole = seconds >= 0x1p64 ? UINT64_MAX : seconds > 0 ? (uint64_t)seconds : 0;
    double rest = seconds - (double)*whole;
    *nanoseconds = rest <= 0 ? 0 : rest >= 0.999999999 ? 999999999 : (uint32_t)(rest * 1e9);
}

double attributes_seconds(const struct lifetimes *l, const struct stat *st)
{
    struct timespec now;
    if (st->st_dev != l->device || l->young == l->old)
        return l->young;
    clock_gettime(CLOCK_REALTIME, &now);
    double age = (double)(now.tv_sec - st->st_ctim.tv_sec) + (double)(now.tv_nsec - st->st_ctim.tv_nsec) / 1e9;
    return age > l->age ? l->old : l->young;
}

void put_absent(const struct lifetimes *l, struct fuse_entry_out *out)
{
    *out = (struct fuse_entry_out){0};
    put_seconds(l->absent, &out->entry_valid, &out->entry_valid_nsec);
}

double put_looked_up(const struct lifetimes *l, const struct stat *st, struct fuse_entry_out *out)
{
    double name = st->st_dev == l->device ? l->name : l->name_elsewhere;
    double seconds = attributes_seconds(l, st);
    put_seconds(name, &out->entry_valid, &out->entry_valid_nsec);
    put_seconds(seconds, &out->attr_valid, &out->attr_valid_nsec);
    put_attributes(st, 0, &out->attr);
    return seconds;
}
