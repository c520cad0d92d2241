#include "reader_interrupt.h"

#include "reader_names.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool may_be_given_up(const struct fuse_in_header *in, size_t length)
{
    struct fuse_open_in open;
    switch (in->opcode) {
    case FUSE_READ:
    case FUSE_GETATTR:
    case FUSE_READLINK:
    case FUSE_STATFS:
    case FUSE_ACCESS:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
    case FUSE_READDIR:
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR:
    case FUSE_LOOKUP:
    case FUSE_READDIRPLUS:
    case FUSE_OPENDIR:
    case FUSE_LSEEK:
        return true;
    case FUSE_OPEN:
        if (length < sizeof *in + sizeof open)
            return false;
        memcpy(&open, in + 1, sizeof open);
        return !(open.flags & O_TRUNC);
    default:
        return false;
    }
}

static uint64_t number_of(const char *status, const char *name, int base)
{
    const char *line = strstr(status, name);
    return line ? strtoull(line + strlen(name), NULL, base) : 0;
}

static uint64_t mask_of(const char *status, const char *name) { return number_of(status, name, 16); }

static uint64_t bit(int signal) { return UINT64_C(1) << (signal - 1); }

bool is_dying(uint32_t thread)
{
    char path[40], status[4096];
    if (!thread) /* not in this name space */
        return false;
    (void)snprintf(path, sizeof path, "/proc/%u/status", thread);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, status, sizeof status - 1);
    close(fd);
    if (n <= 0)
        return false;
    status[n] = 0;
    /* The kernel makes a SIGKILL of a signal that nobody handles, unless that signal leaves a core file. */
    uint64_t pending = mask_of(status, "\nSigPnd:") | mask_of(status, "\nShdPnd:");
    uint64_t kept = mask_of(status, "\nSigBlk:") | mask_of(status, "\nSigIgn:") | mask_of(status, "\nSigCgt:");
    uint64_t cores = bit(SIGQUIT) | bit(SIGILL) | bit(SIGTRAP) | bit(SIGABRT) | bit(SIGFPE) | bit(SIGSEGV) | bit(SIGBUS)
        | bit(SIGSYS) | bit(SIGXCPU) | bit(SIGXFSZ);
    if (number_of(status, "\nTracerPid:", 10)) /* which may keep any other from it */
        cores = 0;
    return pending & (bit(SIGKILL) | (cores & ~kept));
}

static size_t forget(uint64_t node, uint8_t *out)
{
    struct {
        struct fuse_in_header in;
        struct fuse_forget_in forget;
    } one = {{.len = sizeof one, .opcode = FUSE_FORGET, .nodeid = node}, {.nlookup = 1}};
    memcpy(out, &one, sizeof one);
    return sizeof one;
}

static size_t forget_listed(const uint8_t *body, size_t length, uint8_t *out)
{
    struct fuse_in_header in = {.opcode = FUSE_BATCH_FORGET};
    struct fuse_batch_forget_in batch = {0, 0};
    size_t to = sizeof in + sizeof batch;
    for (size_t at = 0; at + FUSE_NAME_OFFSET_DIRENTPLUS <= length;) {
        struct fuse_direntplus entry;
        memcpy(&entry, body + at, FUSE_NAME_OFFSET_DIRENTPLUS);
        struct fuse_forget_one one = {.nodeid = entry.entry_out.nodeid, .nlookup = 1};
        if (at + FUSE_NAME_OFFSET_DIRENTPLUS + entry.dirent.namelen > length)
            break;
        if (one.nodeid && !name_is_dots((const char *)body + at + FUSE_NAME_OFFSET_DIRENTPLUS, entry.dirent.namelen)) {
            memcpy(out + to, &one, sizeof one);
            to += sizeof one;
            batch.count++;
        }
        at += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + entry.dirent.namelen);
    }
    in.len = (uint32_t)to;
    memcpy(out, &in, sizeof in);
    memcpy(out + sizeof in, &batch, sizeof batch);
    return batch.count ? to : 0;
}

static size_t release(uint32_t opcode, const uint8_t *body, uint8_t *out)
{
    struct fuse_open_out opened;
    struct {
        struct fuse_in_header in;
        struct fuse_release_in release;
    } one = {{.len = sizeof one, .opcode = opcode}, {0}};
    memcpy(&opened, body, sizeof opened);
    one.release.fh = opened.fh;
    memcpy(out, &one, sizeof one);
    return sizeof one;
}

size_t undo(uint32_t opcode, const uint8_t *reply, size_t length, uint8_t *out, bool *answered)
{
    struct fuse_out_header head;
    const uint8_t *body = reply + sizeof head;
    memcpy(&head, reply, sizeof head);
    length -= sizeof head;
    *answered = false;
    if (head.error)
        return 0;
    if (opcode == FUSE_LOOKUP && length >= sizeof(struct fuse_entry_out)) {
        struct fuse_entry_out entry;
        memcpy(&entry, body, sizeof entry);
        return entry.nodeid ? forget(entry.nodeid, out) : 0;
    }
    if (opcode == FUSE_READDIRPLUS)
        return forget_listed(body, length, out);
    if ((opcode == FUSE_OPEN || opcode == FUSE_OPENDIR) && length >= sizeof(struct fuse_open_out)) {
        *answered = true;
        return release(opcode == FUSE_OPEN ? FUSE_RELEASE : FUSE_RELEASEDIR, body, out);
    }
    return 0;
}
