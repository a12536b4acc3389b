/* rpc_tsan.h - what rpc_server.c and rpc_client.c tell ThreadSanitizer. gRPC core is not built for it, so it cannot see that what
 * happened before an operation was started happened before its completion. These say so. */
#ifndef CONVOKE_CLUSTER_RPC_TSAN_H
#define CONVOKE_CLUSTER_RPC_TSAN_H

#if defined(__SANITIZE_THREAD__)
void __tsan_acquire(void *);
void __tsan_release(void *);
#define HANDED_OVER(tag) __tsan_release(tag)
#define TAKEN_OVER(tag)  __tsan_acquire(tag)
#else
#define HANDED_OVER(tag) (void)(tag)
#define TAKEN_OVER(tag)  (void)(tag)
#endif

#endif
