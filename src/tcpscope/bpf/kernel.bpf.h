/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only */
/*
 * The part of the kernel's types that tcpscope reads, and nothing else.
 *
 * When libbpf loads an object, it finds every field by name in the running kernel's BTF (CO-RE). So only the names and kinds
 * of the fields matter, not their offsets. Each struct says where the kernel defines it.
 */
#ifndef TCPSCOPE_KERNEL_BPF_H
#define TCPSCOPE_KERNEL_BPF_H

#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_endian.h>

#define AF_INET 2
#define AF_INET6 10
#define AF_UNSPEC 0
#define ETH_P_IP 0x0800 /* include/uapi/linux/if_ether.h */
#define ETH_P_IPV6 0x86DD
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_ICMPV6 58
#define IPPROTO_MPTCP 262
#define S_IFMT 00170000
#define S_IFSOCK 0140000
#define SHUTDOWN_MASK 3 /* include/net/sock.h */
#define RCV_SHUTDOWN 1
#define RTN_LOCAL 2          /* include/uapi/linux/rtnetlink.h */
#define RTF_LOCAL 0x80000000 /* include/uapi/linux/ipv6_route.h */
#define SKB_DST_NOREF 1UL    /* include/linux/skbuff.h */
#define TCP_CA_RECOVERY 3    /* enum tcp_ca_state: include/uapi/linux/tcp.h */
#define TCP_CA_LOSS 4
#define ICSK_TIME_LOSS_PROBE 5 /* include/net/inet_connection_sock.h */
#define ICSK_TIME_REO_TIMEOUT 6
#define IORING_OP_ACCEPT 13       /* include/uapi/linux/io_uring.h */
#define SOCKFS_MAGIC 0x534F434B   /* include/uapi/linux/magic.h */
#define RTCF_BROADCAST 0x10000000 /* include/uapi/linux/in_route.h */
#define RTCF_MULTICAST 0x20000000

/* include/uapi/asm-generic/errno.h, errno-base.h */
#define EINTR 4
#define EEXIST 17
#define EPIPE 32
#define EADDRINUSE 98
#define EADDRNOTAVAIL 99
#define ENETDOWN 100
#define ENETUNREACH 101
#define ECONNABORTED 103
#define ECONNRESET 104
#define ENOBUFS 105
#define EISCONN 106
#define ETIMEDOUT 110
#define ECONNREFUSED 111
#define EHOSTDOWN 112
#define EHOSTUNREACH 113
#define EALREADY 114
#define EINPROGRESS 115
#define ERESTARTSYS 512 /* include/linux/errno.h: up to ERESTART_RESTARTBLOCK the kernel's own */
#define ERESTART_RESTARTBLOCK 516

/* include/net/tcp_states.h */
enum tcp_state {
	STATE_ESTABLISHED = 1,
	STATE_SYN_SENT,
	STATE_SYN_RECV,
	STATE_FIN_WAIT1,
	STATE_FIN_WAIT2,
	STATE_TIME_WAIT,
	STATE_CLOSE,
	STATE_CLOSE_WAIT,
	STATE_LAST_ACK,
	STATE_LISTEN,
	STATE_CLOSING,
	STATE_NEW_SYN_RECV,
} __attribute__((packed));

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t; /* include/linux/types.h */
typedef struct {
	__s64 counter;
} atomic64_t; /* include/linux/types.h */
typedef struct {
	unsigned int val;
} kuid_t;         /* include/linux/uidgid_types.h */
struct spinlock { /* include/linux/spinlock_types.h: which members it has differs */
};
typedef struct {
	struct spinlock slock;
	int owned; /* by a process */
} socket_lock_t;   /* include/net/sock.h */

struct in6_addr { /* include/uapi/linux/in6.h */
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct ns_common { /* include/linux/ns_common.h */
	unsigned int inum;
};

struct netns_core { /* include/net/netns/core.h */
	int sysctl_somaxconn;
};

struct hlist_nulls_node { /* include/linux/list_nulls.h */
	struct hlist_nulls_node *next;
};

struct hlist_nulls_head { /* include/linux/list_nulls.h */
	struct hlist_nulls_node *first;
};

struct inet_listen_hashbucket { /* include/net/inet_hashtables.h */
	struct hlist_nulls_head nulls_head;
};

struct inet_ehash_bucket { /* include/net/inet_hashtables.h */
	struct hlist_nulls_head chain;
};

struct inet_bind_bucket { /* include/net/inet_hashtables.h; of a port */
	signed char fastreuse;
	signed char fastreuseport;
};

struct inet_hashinfo { /* include/net/inet_hashtables.h */
	struct inet_ehash_bucket *ehash;
	unsigned int ehash_mask;
	unsigned int lhash2_mask;
	struct inet_listen_hashbucket *lhash2;
};

struct inet_timewait_death_row { /* include/net/netns/ipv4.h */
	struct inet_hashinfo *hashinfo;
};

struct local_ports { /* include/net/netns/ipv4.h */
	__u32 range; /* since 6.8: the last port in the upper half */
};

struct local_ports___pair { /* until 6.7 */
	int range[2];
};

struct netns_ipv4 { /* include/net/netns/ipv4.h; widths changed in 5.15 */
	struct inet_timewait_death_row tcp_death_row;
	struct local_ports ip_local_ports;
	__u32 sysctl_ip_local_port_step_width;      /* since 7.1 */
	unsigned long *sysctl_local_reserved_ports; /* a bitmap of all ports */
	__u8 sysctl_tcp_tw_reuse;
	__u8 sysctl_tcp_mtu_probing;
	int sysctl_tcp_keepalive_time; /* in jiffies */
	__u8 sysctl_tcp_syncookies;
	__u8 sysctl_tcp_abort_on_overflow;
	int sysctl_tcp_fin_timeout; /* in jiffies */
	int sysctl_max_syn_backlog;
};

struct linux_mib; /* include/net/snmp.h: only an array of counters, as the next one */
struct tcp_mib;

struct netns_mib {                        /* include/net/netns/mib.h */
	struct linux_mib *net_statistics; /* per CPU, as the next one */
	struct tcp_mib *tcp_statistics;
};

struct net { /* include/net/net_namespace.h */
	struct ns_common ns;
	struct netns_core core;
	struct netns_ipv4 ipv4;
	struct netns_mib mib;
	__u64 net_cookie; /* an atomic64_t before 5.12, and 0 there until somebody asks for it */
	__u32 hash_mix;
};

typedef struct {
	struct net *net;
} possible_net_t; /* include/net/net_namespace.h */

struct sock_common { /* include/net/sock.h */
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_ipv6only : 1;
	possible_net_t skc_net;
	unsigned int skc_hash;
	unsigned long skc_flags;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
	struct hlist_nulls_node skc_nulls_node;
	struct sock *skc_listener; /* of a request */
	__u32 skc_rcv_wnd;         /* of a request */
};

struct net_device { /* include/linux/netdevice.h */
	char name[16];
	int ifindex;
	possible_net_t nd_net;
};

struct dst_entry { /* include/net/dst.h */
	struct net_device *dev;
};

struct sk_buff_head {         /* include/linux/skbuff.h */
	struct sk_buff *prev; /* the last one */
	__u32 qlen;
};

struct timer_list { /* include/linux/timer_types.h; before 6.14 in include/linux/timer.h */
	unsigned long expires;
	void *function;
};

struct sock { /* include/net/sock.h */
	struct sock_common __sk_common;
	socket_lock_t sk_lock;
	struct sk_buff_head sk_error_queue;
	struct sk_buff_head sk_receive_queue;
	struct {
		atomic_t rmem_alloc; /* of sk_receive_queue, too */
		int len;
	} sk_backlog;
	struct timer_list tcp_retransmit_timer; /* since 6.19 */
	atomic_t sk_drops;
	int sk_rcvbuf;
	int sk_sndbuf;
	int sk_wmem_queued;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
	kuid_t sk_uid;
	int sk_err;
	int sk_err_soft;
	__u8 sk_shutdown;
	__u8 sk_userlocks : 4;
	__u16 sk_protocol;
	unsigned long sk_lingertime;
	struct socket *sk_socket;
};

/* include/net/sock.h */
enum sock_flags {
	SOCK_DEAD,
	SOCK_DONE,
	SOCK_KEEPOPEN,
	SOCK_LINGER,
};

/* include/net/rstreason.h, since 6.10 */
enum sk_rst_reason {
	SK_RST_REASON_INVALID_SYN,
	SK_RST_REASON_MPTCP_RST_EUNSPEC,    /* the first one of MPTCP */
	SK_RST_REASON_MPTCP_RST_EMIDDLEBOX, /* the last one */
};

struct socket { /* include/linux/net.h */
	struct sock *sk;
};

struct inet_sock { /* include/net/inet_sock.h */
	__be16 inet_sport;
	__u32 local_port_range; /* the last port in the upper half; 0: none. Since 6.8 */
};

struct inet_sock___pair { /* from 6.3, and Debian's 6.1, until 6.7 */
	struct {
		__u16 lo;
		__u16 hi;
	} local_port_range;
};

struct request_sock { /* include/net/request_sock.h */
	struct sock_common __req_common;
	__u8 num_timeout : 7;
};

struct tcp_request_sock { /* include/linux/tcp.h */
	__u64 snt_synack;
	__u32 rcv_nxt;
};

struct request_sock_queue { /* include/net/request_sock.h */
	__u8 rskq_defer_accept;
	atomic_t qlen;
	struct request_sock *rskq_accept_head;
};

struct inet_connection_sock { /* include/net/inet_connection_sock.h */
	struct request_sock_queue icsk_accept_queue;
	struct inet_bind_bucket *icsk_bind_hash;
	void *icsk_ulp_data;
	unsigned long icsk_timeout;              /* until 6.12 or a later one before 6.16 */
	struct timer_list icsk_retransmit_timer; /* until 6.18 */
	__u32 icsk_rto;
	__u8 icsk_ca_state : 5;
	__u8 icsk_retransmits;
	__u8 icsk_pending;
	__u8 icsk_backoff;
	__u8 icsk_probes_out;
	__u32 icsk_user_timeout; /* in milliseconds */
	struct {
		__u32 lrcvtime; /* when data was received, in jiffies */
	} icsk_ack;
};

struct tcp_rack { /* include/linux/tcp.h, as struct tcp_sock.rack */
	__u64 mstamp;
	__u32 rtt_us;
	__u32 end_seq;
};

struct minmax_sample { /* include/linux/win_minmax.h */
	__u32 v;
};

struct minmax { /* include/linux/win_minmax.h */
	struct minmax_sample s[3];
};

struct list_head { /* include/linux/types.h */
	struct list_head *next;
};

struct tcp_sock { /* include/linux/tcp.h */
	struct inet_connection_sock inet_conn;
	__u64 bytes_received;
	__u32 segs_in;
	__u32 data_segs_in;
	__u32 rcv_nxt;
	__u32 rcv_wup; /* rcv_nxt when the window was last offered */
	__u32 rcv_wnd;
	__u32 copied_seq;
	__u32 segs_out;
	__u32 data_segs_out;
	__u64 bytes_sent;
	__u64 bytes_acked;
	__u64 bytes_retrans;
	__u64 tcp_wstamp_ns; /* when the last segment was sent, as ktime_get_ns() */
	__u64 tcp_mstamp;    /* when the socket began with what it does now */
	__u64 delivered_mstamp;
	__u32 write_seq;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 snd_wnd;
	__u32 mss_cache;
	__u32 lsndtime;   /* when data was sent, in jiffies */
	__u32 rcv_tstamp; /* when an ACK was received, in jiffies */
	__u32 dsack_dups;
	__u32 reord_seen;
	__u8 nonagle : 4;
	__u32 srtt_us;
	struct minmax rtt_min;
	__u32 total_retrans;
	__u32 retrans_out;
	__u32 packets_out;
	__u32 lost_out;
	__u32 sacked_out;
	__u32 snd_cwnd;
	__u32 snd_ssthresh;
	unsigned int keepalive_time; /* in jiffies; 0: that of the namespace */
	__u32 undo_marker;
	struct list_head tsorted_sent_queue;
	__u32 chrono_start; /* in jiffies, as chrono_stat */
	__u32 chrono_stat[3];
	__u8 chrono_type : 2;
	__u8 is_cwnd_limited : 1;
	__u32 app_limited;
	__u8 is_mptcp : 1; /* with CONFIG_MPTCP */
	__u8 repair : 1;
	int linger2;
	struct tcp_rack rack;
};

struct mptcp_sock { /* net/mptcp/protocol.h; with CONFIG_MPTCP */
	struct sock *first;
	struct socket *subflow; /* until 6.5 */
};

struct mptcp_subflow_context { /* net/mptcp/protocol.h; with CONFIG_MPTCP */
	struct sock *conn;
	__u32 send_fastclose : 1;
	__u32 resetting : 1; /* not in 6.16 to 7.1 */
	__u8 reset_reason : 4;
};

struct sk_buff {                /* include/linux/skbuff.h */
	struct sk_buff *next;   /* in a list that is dequeued at once */
	struct net_device *dev; /* in a union with the links of a tree */
	struct sock *sk;
	char cb[48];
	unsigned long _skb_refdst; /* a struct dst_entry, and a flag in the lowest bit */
	unsigned int len;
	int skb_iif;
	__u16 queue_mapping;
	__be16 protocol;
	__u16 inner_transport_header; /* those of a packet in a tunnel, from `head` */
	__u16 inner_network_header;
	__u16 transport_header;
	__u16 network_header;
	unsigned int tail; /* of the linear part, from `head` */
	unsigned int end;  /* where struct skb_shared_info is, from `head` */
	unsigned char *head;
	unsigned char *data;
};

struct nf_hook_state { /* include/linux/netfilter.h */
	__u8 hook;     /* wider before 5.16 */
	__u8 pf;
};

struct skb_shared_info {         /* include/linux/skbuff.h */
	unsigned short gso_size; /* of the data in a segment; 0: the packet is not cut */
};

struct netdev_queue { /* include/linux/netdevice.h */
	struct net_device *dev;
};

struct rtable { /* include/net/route.h */
	struct dst_entry dst;
	unsigned int rt_flags;
	__u16 rt_type;
};

struct rt6_info { /* include/net/ip6_fib.h */
	struct dst_entry dst;
	__u32 rt6i_flags;
};

struct tcp_skb_cb { /* include/net/tcp.h, in sk_buff.cb */
	__u32 seq;
	__u32 end_seq;
	__u32 ack_seq;
	__u16 tcp_gso_segs;
	__u8 tcp_flags; /* of 16 bits since 6.15 */
};

struct sock_extended_err { /* include/uapi/linux/errqueue.h */
	__u32 ee_errno;
	__u8 ee_origin;
};

struct sock_exterr_skb { /* include/linux/errqueue.h, in sk_buff.cb */
	struct sock_extended_err ee;
};

struct inet_timewait_sock { /* include/net/inet_timewait_sock.h */
	struct sock_common __tw_common;
	volatile unsigned char tw_substate;
	struct timer_list tw_timer;
	struct inet_bind_bucket *tw_tb;
};

struct tcp_timewait_sock { /* include/linux/tcp.h */
	struct inet_timewait_sock tw_sk;
};

struct super_block { /* include/linux/fs.h */
	unsigned long s_magic;
};

struct inode { /* include/linux/fs.h */
	unsigned short i_mode;
	struct super_block *i_sb;
};

struct file { /* include/linux/fs.h */
	struct inode *f_inode;
	void *private_data;
};

struct fdtable { /* include/linux/fdtable.h */
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct { /* include/linux/fdtable.h */
	struct fdtable *fdt;
};

struct kernfs_node { /* include/linux/kernfs.h */
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state { /* include/linux/cgroup-defs.h */
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup { /* include/linux/cgroup-defs.h */
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
};

struct css_set { /* include/linux/cgroup-defs.h */
	struct cgroup *dfl_cgrp;
};

struct cred { /* include/linux/cred.h */
	kuid_t uid;
};

struct pid_namespace { /* include/linux/pid_namespace.h */
	struct ns_common ns;
};

struct upid { /* include/linux/pid.h: the number in one namespace */
	int nr;
	struct pid_namespace *ns;
};

struct pid { /* include/linux/pid.h */
	unsigned int level;
	struct upid numbers[0]; /* by level: 0 is the first namespace */
};

#if defined(__TARGET_ARCH_x86)
struct thread_info { /* arch/x86/include/asm/thread_info.h */
	__u32 status;
};
#endif

struct nsproxy { /* include/linux/nsproxy.h */
	struct net *net_ns;
};

struct task_struct { /* include/linux/sched.h */
#if defined(__TARGET_ARCH_x86)
	struct thread_info thread_info;
#endif
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	__u64 start_time;
	const struct cred *cred;
	char comm[16];
	struct files_struct *files;
	struct nsproxy *nsproxy; /* NULL of a task that exits */
	struct css_set *cgroups;
};

struct proto_accept_arg {
}; /* include/net/sock.h, since 6.10 */

struct tp_transition_snapshot { /* kernel/tracepoint.c */
	unsigned long srcu_gp;  /* since 7.0 */
};

struct trace_event_raw_tcp_retransmit_skb { /* include/trace/events/tcp.h, since 6.17 */
	int err;
};

enum gro_result { GRO_MERGED, GRO_MERGED_FREE }; /* include/linux/netdevice.h */

/* include/net/dropreason-core.h, since 5.17 */
enum skb_drop_reason { SKB_NOT_DROPPED_YET, SKB_DROP_REASON_NOT_SPECIFIED };

struct trace_event_raw_kfree_skb {   /* include/trace/events/skb.h */
	enum skb_drop_reason reason; /* since 5.17 */
	void *rx_sk;                 /* since 6.11 */
};

struct pt_regs___kernel { /* arch/{x86,arm64}/include/asm/ptrace.h */
#if defined(__TARGET_ARCH_x86)
	unsigned long bx;
	unsigned long cx;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
#elif defined(__TARGET_ARCH_arm64)
	__u64 regs[31];
	__u64 pstate;
	__u64 orig_x0;
	int syscallno;
#endif
};

struct io_kiocb { /* include/linux/io_uring_types.h */
	struct file *file;
	__u8 opcode;
};

struct io_uring_cqe { /* include/uapi/linux/io_uring.h */
	__s32 res;
};

struct bpf_array {      /* include/linux/bpf.h */
	void *pptrs[0]; /* per CPU */
};

struct seq_file; /* include/linux/seq_file.h */

struct bpf_iter_meta { /* include/linux/bpf.h */
	struct seq_file *seq;
};

struct bpf_iter__task_file { /* kernel/bpf/task_iter.c */
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

struct bpf_map; /* include/linux/bpf.h */

struct bpf_iter__bpf_map { /* kernel/bpf/map_iter.c */
	struct bpf_map *map;
};

struct bpf_iter__bpf_map_elem { /* kernel/bpf/map_iter.c */
	void *key;
};

struct bpf_iter__tcp { /* net/ipv4/tcp_ipv4.c */
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	__u32 uid;
};

#pragma clang attribute pop

#endif
