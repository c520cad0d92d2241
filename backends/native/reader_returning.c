/* From libfuse to the kernel: the other half of reader_passing.h. */
#include "reader_interrupt.h"
#include "reader_passing.h"
#include "reader_rings.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define OWN_NUMBERS (UINT64_C(1) << 62) /* the kernel does not come so far */

void reply_bytes(const struct passing *p, struct entry *entry, uint64_t unique, const uint8_t *data, size_t length)
{
    if (entry) {
        entry_answer(entry, 0, data, length);
        return;
    }
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .unique = unique};
    struct iovec parts[2] = {{&out, sizeof out}, {(void *)data, length}};
    ssize_t ignored = writev(p->device, parts, length ? 2 : 1); /* ENOENT: whoever asked is gone */
    (void)ignored;
}

void reply_error(const struct passing *p, struct entry *entry, uint64_t unique, int error)
{
    if (entry) {
        entry_answer(entry, error, NULL, 0);
        return;
    }
    struct fuse_out_header out = {.len = sizeof out, .error = error, .unique = unique};
    ssize_t ignored = write(p->device, &out, sizeof out);
    (void)ignored;
}

void tell_doubt(const struct passing *p, uint64_t nodeid)
{
    struct {
        struct fuse_out_header out;
        struct fuse_notify_inval_inode_out which;
    } notice = {{.len = sizeof notice, .error = FUSE_NOTIFY_INVAL_INODE}, {.ino = nodeid, .off = -1}};
    ssize_t ignored = write(p->device, &notice, sizeof notice); /* ENOENT: it does not know the node */
    (void)ignored;
}

/* The buffer that the reply to a READ names, NULL: none. */
static struct buffer *named_buffer(struct passing *p, size_t length)
{
    uint64_t number;
    if (length != sizeof(struct fuse_out_header) + sizeof number)
        return NULL;
    memcpy(&number, p->reply + sizeof(struct fuse_out_header), sizeof number);
    return buffers_sent(p->buffers, number);
}

static void reply_by_number(struct passing *p, const struct flight *f, size_t length)
{
    struct buffer *b = named_buffer(p, length);
    if (b && b->error && f->fills) /* which takes fewer bytes for the end of the file, and fills it up with zeros */
        reply_error(p, f->entry, f->unique, -(b->error < MOST_ERROR ? b->error : EIO));
    else if (b && b->length <= f->size)
        reply_bytes(p, f->entry, f->unique, b->data + b->start, b->length);
    else
        reply_error(p, f->entry, f->unique, -EIO);
    if (b)
        buffer_drop(b);
}

static bool is_own(const struct flight *f) { return f->unique >= OWN_NUMBERS; }

/* Of stores to mapped memory, whose end only has the kernel ask again: it would believe an older answer that comes after it. */
static bool writes_back(const struct flight *f)
{
    struct fuse_write_in in;
    if (f->opcode != FUSE_WRITE || !f->payload)
        return false;
    memcpy(&in, f->payload->data + sizeof(struct fuse_in_header), sizeof in);
    return in.write_flags & FUSE_WRITE_CACHE;
}

/* Whether a request may have changed names or attributes. Not a WRITE by a program: the kernel counts these by itself, for the file
 * alone. */
static bool is_change(const struct flight *f)
{
    if (writes_back(f))
        return true;
    switch (f->opcode) {
    case FUSE_SETATTR:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
    case FUSE_LINK:
    case FUSE_SETXATTR:
    case FUSE_REMOVEXATTR:
    case FUSE_CREATE:
    case FUSE_FALLOCATE:
        return true;
    default:
        return f->opcode == FUSE_OPEN && !f->reads_only; /* it may have truncated the file */
    }
}

static struct flight *landed(struct passing *p, uint64_t unique)
{
    pthread_mutex_lock(&p->lock);
    struct flight *f = unique ? flights_take(&p->flights, unique) : NULL;
    if (f) {
        if (!f->held) {
            p->room_used -= f->room;
            atomic_fetch_sub(&p->expected, 1);
        }
        if (f->opcode == FUSE_READ)
            p->reading -= f->size;
        if (f->opcode == FUSE_WRITE)
            p->writing -= f->size;
        if (f->interrupted && !f->given_up)
            atomic_fetch_sub(&p->interrupted, 1);
        p->abandoned -= f->given_up && !is_own(f);
        f->overtaken = f->changes != p->changes;
        p->changes += is_change(f);
    }
    pthread_mutex_unlock(&p->lock);
    return f;
}

/* The reply to a request that was given up: nobody gets it. */
static void drop_late(struct passing *p, const struct flight *f, size_t length)
{
    struct buffer *b = f->opcode == FUSE_READ ? named_buffer(p, length) : NULL;
    const uint8_t *reply = p->reply;
    bool answered;
    if (b)
        buffer_drop(b);
    amend(&p->amendments, f->opcode, false, p->reply, length); /* so that none is left */
    if (f->opcode == FUSE_READDIRPLUS && f->payload) {
        reply = f->payload->data;
        length = sizeof(struct fuse_out_header) + f->length;
    }
    uint8_t *request = malloc(length + 64);
    size_t n = request ? undo(f->opcode, reply, length, request, &answered) : 0;
    if (n) {
        struct fuse_in_header *in = (void *)request;
        struct flight *own = NULL;
        pthread_mutex_lock(&p->lock);
        if (answered && (own = flights_add(&p->flights, in->unique = OWN_NUMBERS | p->own++))) {
            own->opcode = in->opcode;
            own->room = room_for(MOST_OTHER);
            own->given_up = true;
        }
        if ((own || !answered) && passing_give(p, own, request, n) == PASSED_NOT && own)
            passing_forsake(p, own);
        pthread_mutex_unlock(&p->lock);
    }
    free(request);
}

/* The reply as it came. */
static void reply_whole(struct passing *p, const struct flight *f, size_t length)
{
    const struct fuse_out_header *out = (const void *)p->reply;
    if (f && f->entry) {
        entry_answer(f->entry, out->error, p->reply + sizeof *out, length - sizeof *out);
        return;
    }
    ssize_t ignored = write(p->device, p->reply, length);
    (void)ignored;
}

static void believe_no_longer(uint8_t *reply, size_t length)
{
    struct fuse_attr_out told;
    if (length < sizeof(struct fuse_out_header) + sizeof told)
        return;
    memcpy(&told, reply + sizeof(struct fuse_out_header), sizeof told);
    told.attr_valid = told.attr_valid_nsec = 0;
    memcpy(reply + sizeof(struct fuse_out_header), &told, sizeof told);
}

/* Whether anybody hears it. */
static bool pass_back(struct passing *p, size_t length)
{
    struct fuse_out_header *out = (void *)p->reply;
    struct flight *f = landed(p, out->unique);
    if (out->error <= -MOST_ERROR) /* a lower has let out what no program should see */
        out->error = -EIO;
    bool heard = !f || !f->given_up;
    if (!heard) {
        drop_late(p, f, length);
    } else if (out->len != length) { /* cut off: larger than anything that was asked for */
        reply_error(p, f ? f->entry : NULL, out->unique, -EIO);
    } else if (f && f->opcode == FUSE_READ && !out->error && length > sizeof *out) {
        reply_by_number(p, f, length);
    } else if (f && f->opcode == FUSE_READDIRPLUS && f->payload && !out->error) {
        reply_bytes(p, f->entry, f->unique, f->payload->data + sizeof *out, f->length);
    } else { /* a notice, if it has no number */
        if (f)
            amend(&p->amendments, f->opcode, f->reads_only, p->reply, length);
        if (f && f->opcode == FUSE_GETATTR && f->overtaken)
            believe_no_longer(p->reply, length);
        reply_whole(p, f, length);
    }
    if (f && f->payload)
        buffer_drop(f->payload);
    free(f);
    return heard;
}

bool passing_reply(struct passing *p, uint64_t unique, int error, const void *bytes, size_t length)
{
    struct fuse_out_header out = {.len = (uint32_t)(sizeof out + length), .error = -error, .unique = unique};
    memcpy(p->reply, &out, sizeof out);
    if (length)
        memcpy(p->reply + sizeof out, bytes, length);
    return pass_back(p, out.len);
}

void passing_drain(struct passing *p)
{
    ssize_t n;
    while ((n = recv(p->ours, p->reply, MOST_MESSAGE, MSG_DONTWAIT)) > 0)
        if ((size_t)n >= sizeof(struct fuse_out_header))
            (void)pass_back(p, (size_t)n);
    pthread_mutex_lock(&p->lock);
    passing_give_kept(p);
    pthread_mutex_unlock(&p->lock);
}
